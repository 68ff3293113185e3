"""Every kind of record that holds what tenants wrote names its tenant as the sealing reads it."""

from dataclasses import replace

from services.gateway.app.contents import CONTENT_BUCKETS, tenant_of
from services.gateway.app.control_cache import IMAGES, CachedImage
from services.gateway.app.dead_letters import LETTERS, DeadLetter
from services.gateway.app.job_store import JOBS
from services.gateway.app.webhooks import DELIVERIES
from services.gateway.domain.delivery import Delivery
from services.kernel.blobs import BlobInfo
from tests.fakes.fleet import CRASH
from tests.fakes.gateway import a_job

BLOB = BlobInfo(scope="acme", digest="sha256:" + "0" * 64, size_bytes=1)


def test_the_buckets_are_those_with_content() -> None:
    assert set(CONTENT_BUCKETS) == {"jobs", "requests", "dead_letters", "deliveries", "control_images"}


def test_each_of_them_names_its_tenant() -> None:
    letter = DeadLetter(task="jobs/1/tasks/1", stage="diffusion", time_s=1.0, failure=CRASH, attempts=(), tenant="acme")
    delivery = Delivery(id="msg_1", job_id="1", url="https://example.com/?secret=1", tenant="acme")
    values = [
        JOBS.encode(replace(a_job("1"), tenant="acme")),
        LETTERS.encode(letter),
        DELIVERIES.encode(delivery),
        IMAGES.encode(CachedImage(blob=BLOB, width_px=1, height_px=1)),
    ]
    assert [tenant_of(value) for value in values] == ["acme"] * 4


def test_the_operators_own_are_the_operators() -> None:
    assert tenant_of(JOBS.encode(a_job("1"))) == "default"
    blob = replace(BLOB, scope="default")
    assert tenant_of(IMAGES.encode(CachedImage(blob=blob, width_px=1, height_px=1))) == "default"
