"""A service's process that only records what happens to it. Started as `python service_process.py NAME DIARY [HOW]`.

HOW: `deaf` takes no SIGTERM, `wrong` ends at once as for a wrong setting, `broken` ends at once with a traceback,
`mute` never is ready, `warm` tells what it uses, and `lonely` too, but is `wrong` where it is not the first one.
"""

import os
import signal
import sys
import threading


def main(name: str, diary: str, how: str = "") -> None:
    def note(what: str) -> None:
        with open(diary, "a") as file:
            file.write(f"{name} {what}\n")

    is_first = "FANLIGHT_WORKER_MEASURE" in os.environ
    if how == "wrong" or (how == "lonely" and not is_first):
        sys.stderr.write("error: the port is taken\n")
        sys.exit(2)
    if how == "broken":
        raise RuntimeError("broken to the core")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: None if how == "deaf" else stop.set())
    note(f"started {os.getpid()} {os.environ.get('FANLIGHT_GATEWAY_GRPC', '-')}")
    sys.stderr.write(f"{name} speaks\n")
    sys.stderr.flush()
    if how != "mute":
        sys.stdout.write("ready http=127.0.0.1:4001 grpc=127.0.0.1:4002\n")
    sys.stdout.flush()
    if how in ("warm", "lonely") and is_first:
        sys.stdout.write("warm cores=1.02 memory_bytes=1000000 cards=0\n")
        sys.stdout.flush()
    threading.Thread(target=follow, args=(int(os.environ["FANLIGHT_LIFELINE_FD"]), stop), daemon=True).start()
    while not stop.wait(0.05):
        pass
    note("stopped")


def follow(lifeline_fd: int, stop: threading.Event) -> None:
    while os.read(lifeline_fd, 64):
        pass
    stop.set()


if __name__ == "__main__":
    main(*sys.argv[1:])
