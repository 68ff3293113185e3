"""s3:// against servers that answer what AWS does when keys, regions, clocks and signatures are wrong."""

import pytest

from fanlight.errors import FanlightError, NotFound
from services.kernel.network import s3_connection
from services.weights.errors import SourceFailed, TokenRefused
from services.weights.references.references import S3Ref
from services.weights.transfer import s3
from tests.fakes.scripted_site import ScriptedSite
from tests.fakes.weight_sites import safetensors
from tests.fakes.weight_stores import open_store

pytest.importorskip("aiobotocore")

MODEL = safetensors({"w": b"7" * 3_000_000})
OBJECT = "s3://weights/a.safetensors"


def _error(code: str, more: str = "") -> bytes:
    return f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>It is so.</Message>{more}</Error>'.encode()


@pytest.fixture
def site():
    with ScriptedSite(lambda request, site: request.send_file(MODEL, ETag='"1"')) as site:
        yield site


@pytest.fixture
def keys(monkeypatch, tmp_path):
    """Write the credentials that AWS tools find."""
    path = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    def write(key: str) -> None:
        path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")

    write("FIRST")
    return write


@pytest.fixture
async def store(site, settings, keys):
    async with open_store(settings(s3_endpoint=site.url, s3_region="us-east-1", connections=2)) as store:
        store._tools.sleep = _no_sleep
        yield store


@pytest.mark.parametrize("status", [400, 401, 403, 404])
async def test_credentials_that_run_out_in_the_middle_are_read_again(site, store, keys, status):
    def answer(request, site):
        if "FIRST" in request.path and site.sent_bytes > 500_000:
            keys("SECOND")
            request.send(status, _error("ExpiredToken"))
        else:
            request.send_file(MODEL, ETag='"1"')

    site.answer = answer
    fetched = await store.fetch(OBJECT, store.selection())
    assert fetched.path.read_bytes() == MODEL
    assert fetched.downloaded_bytes == len(MODEL)
    assert any("SECOND" in path for path in site.asked)


async def test_they_are_read_again_for_a_server_without_ranges_too(site, store, keys):
    def answer(request, site):
        if len(site.asked) in (1, 2):
            request.send(200, MODEL, ETag='"1"')
        elif "FIRST" in request.path:
            keys("SECOND")
            request.send(403, _error("ExpiredToken"))
        else:
            request.send(200, MODEL, ETag='"1"')

    site.answer = answer
    assert (await store.ensure(OBJECT)).read_bytes() == MODEL


@pytest.mark.parametrize(
    ("status", "body", "headers", "kind", "told"),
    [
        (301, _error("PermanentRedirect"), {"x_amz_bucket_region": "eu-west-1"}, SourceFailed, "region eu-west-1; set"),
        (301, _error("PermanentRedirect", "<Region>eu-west-1</Region>"), {}, SourceFailed, "region eu-west-1; set"),
        (
            400,
            _error("AuthorizationHeaderMalformed", "<Region>eu-west-1</Region>"),
            {},
            SourceFailed,
            "AuthorizationHeaderMalformed.*region eu-west-1",
        ),
        (403, _error("AccessDenied"), {}, TokenRefused, "403 .AccessDenied: It is so.*check the credentials"),
        (403, _error("RequestTimeTooSkewed"), {}, TokenRefused, "RequestTimeTooSkewed.*set this machine's clock"),
        (404, _error("NoSuchBucket"), {}, NotFound, "NoSuchBucket"),
    ],
)
async def test_a_refusal_has_the_code_of_aws(site, store, status, body, headers, kind, told):
    site.answer = lambda request, _: request.send(status, body, **headers)
    with pytest.raises(kind, match=f"{OBJECT}: .*{told}"):
        await store.ensure(OBJECT)
    assert store.objects.index.objects() == []


@pytest.mark.parametrize(
    ("status", "code", "kind", "told"),
    [
        (403, "AccessDenied", TokenRefused, "AccessDenied: check the AWS credentials"),
        (400, "ExpiredToken", TokenRefused, "ExpiredToken: check the AWS credentials"),
        (403, "RequestTimeTooSkewed", SourceFailed, "set this machine's clock"),
        (404, "NoSuchBucket", NotFound, "NoSuchBucket"),
    ],
)
async def test_a_listing_that_is_refused_has_it_too(site, store, status, code, kind, told):
    site.answer = lambda request, _: request.send(status, _error(code))
    with pytest.raises(kind, match=told):
        await store.ensure("s3://weights/folder/")


async def test_a_bucket_of_another_region_is_named_for_a_listing(site, store):
    headers = {"x_amz_bucket_region": "eu-west-1"}
    site.answer = lambda request, _: request.send(301, _error("PermanentRedirect"), **headers)
    with pytest.raises(FanlightError, match="eu-west-1"):
        await store.ensure("s3://weights/folder/")


async def test_another_server_than_amazons_gets_no_checksum_that_it_did_not_ask_for(site, keys, tmp_path):
    sent: list[str] = []

    def answer(request, site):
        request.rfile.read(int(request.headers["content-length"]))
        sent.extend(name.lower() for name in request.headers)
        request.send(200, ETag='"1"')

    site.answer = answer
    (tmp_path / "file").write_bytes(b"weights")
    await s3.upload(S3Ref(bucket="weights", key="a"), tmp_path / "file", endpoint=site.url, region="us-east-1")
    assert "content-length" in sent
    assert not [name for name in sent if "checksum" in name or "trailer" in name]


@pytest.mark.parametrize(
    ("endpoint", "is_amazon"),
    [
        ("", True),
        ("https://s3.eu-west-1.amazonaws.com", True),
        ("https://s3.cn-north-1.amazonaws.com.cn", True),
        ("https://account.r2.cloudflarestorage.com", False),
        ("http://127.0.0.1:9000", False),
        ("https://amazonaws.com.example", False),
    ],
)
def test_only_amazon_gets_all_checksums(endpoint, is_amazon):
    config, _ = s3_connection(endpoint)
    assert ("request_checksum_calculation" not in config) == is_amazon


async def _no_sleep(wait_s: float) -> None:
    pass
