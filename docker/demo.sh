#!/usr/bin/env bash
# The main job through the containers of compose.yaml: a photo goes in, images that follow its edges come out.
# Then a worker is killed in the middle of a job, and everything is stopped by SIGTERM.
#
#   docker/demo.sh [OUT]     `make compose-demo`; needs the container images. Images go to OUT, or to demo/out/compose.
# COMPOSE and ENGINE name other programs than podman-compose and podman: COMPOSE="docker compose" ENGINE=docker.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-demo/out/compose}
export FANLIGHT_HTTP_PORT=${FANLIGHT_HTTP_PORT:-18080} FANLIGHT_GRPC_PORT=${FANLIGHT_GRPC_PORT:-18051}
FANLIGHT_CLIENT_TOKEN=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
export FANLIGHT_CLIENT_TOKEN
python=$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)
file=compose.yaml
url=https://127.0.0.1:$FANLIGHT_HTTP_PORT
engine=${ENGINE:-podman}
patience_s=${FANLIGHT_DEMO_PATIENCE_S:-300}
poll_s=60
mkdir -p "$out"

# podman runs health checks by systemd; where there is none, it takes a container with one for not started.
if [ ! -d /run/systemd/system ]; then
    file=$out/compose.yaml
    "$python" -c 'import sys, yaml
whole = yaml.safe_load(open("compose.yaml"))
for service in whole["services"].values():
    service.pop("healthcheck")
    for needed in service.get("depends_on", {}).values():
        if needed["condition"] == "service_healthy":
            needed["condition"] = "service_started"
yaml.safe_dump(whole, sys.stdout)' > "$file"
fi
compose=(${COMPOSE:-podman-compose} --project-name fanlight-demo --file "$file")

stop() {
    "${compose[@]}" down --volumes > "$out/down.log" 2>&1 || cat "$out/down.log" >&2
}
trap stop EXIT

call() {
    curl --silent --show-error --fail-with-body --cacert "$out/authority.pem" --header "Authorization: bearer $FANLIGHT_CLIENT_TOKEN" "$@"
}

container() {
    "$engine" ps --quiet --filter label=com.docker.compose.project=fanlight-demo \
        --filter "label=com.docker.compose.service=$1"
}

# Submits a job, waits up to $2 seconds, and prints it; the files it refers to are the further arguments.
job_of() {
    call --form "job=$1" "${@:3}" "$url/v1/jobs?wait=$2"
}

look_at() {
    call "$url/v1/jobs/$(value name <<< "$1" | sed 's#^jobs/##')?wait=$2"
}

value() {
    "$python" -c 'import functools, json, sys
print(functools.reduce(lambda v, k: v[int(k) if isinstance(v, list) else k], sys.argv[1:], json.load(sys.stdin)))' "$@"
}

"${compose[@]}" up --detach > "$out/up.log" 2>&1 || { cat "$out/up.log" >&2; exit 1; }
echo "started; waiting for the gateway and its workers"
workers=0
for ((second = 0; second < patience_s; second++)); do
    # The gateway makes its certificate when it starts for the first time.
    "$engine" cp "$(container gateway):/data/tls/authority.pem" "$out/authority.pem" > "$out/cp.log" 2>&1 || { sleep 1; continue; }
    workers=$(call "$url/v1/workers" 2> /dev/null | grep --only-matching '"worker":' | wc --lines || true)
    [ "$workers" -ge 2 ] && break
    sleep 1
done
[ "$workers" -ge 2 ] || { echo "error: no workers after $patience_s s" >&2; "${compose[@]}" logs >&2; exit 1; }

# Waits until the job has succeeded, and saves its first image.
finish() {
    job=$1
    for ((waited_s = 0; waited_s < patience_s; waited_s += poll_s)); do
        state=$(value state <<< "$job")
        case $state in STATE_SUCCEEDED | STATE_FAILED | STATE_CANCELLED) break ;; esac
        job=$(look_at "$job" "$poll_s")
    done
    [ "$state" = STATE_SUCCEEDED ] || { echo "error: the job ended as $job" >&2; exit 1; }
    call --output "$out/image-$2.png" "$url/v1/blobs/$(value images 0 blob digest <<< "$job")"
    echo "saved $out/image-$2.png"
}

job=$(job_of '{"generation": {"prompt": "a cup of coffee on a blue background, 3d style", "seed": 1,
    "controls": [{"annotator": "canny", "image": {"url": "part:photo"}}]}}' "$poll_s" \
    --form photo=@demo/photos/coffee.jpg) || { echo "error: $job" >&2; exit 1; }
finish "$job" 1

job=$(job_of '{"generation": {"prompt": "a red apple", "seed": 2, "count": 4, "steps": 100}}' 0) || { echo "error: $job" >&2; exit 1; }
for ((tick = 0; tick < patience_s * 10; tick++)); do
    [ "$(value state <<< "$job")" = STATE_QUEUED ] || break
    sleep 0.1
    job=$(look_at "$job" 0)
done
worker=$(container diffusion)
"$engine" kill --signal KILL "$worker" > "$out/kill.log"
job=$(look_at "$job" 0)
echo "killed the diffusion worker; its job is $(value state <<< "$job") and goes on when it is back"
[ "$(value state <<< "$job")" != STATE_SUCCEEDED ] || { echo "error: the job was done already" >&2; exit 1; }
(sleep 3; "$engine" start "$worker" > "$out/restart.log" 2>&1) &
finish "$job" 2
wait
