"""Data keys under bad conditions: lost, wrong and damaged keys, rotations that stop in the middle, other gateways."""

import asyncio
import json
import os
from pathlib import Path

import pytest

from fanlight.errors import NotFound, Unavailable
from services.gateway.adapters.key_vaults import FolderVault
from services.gateway.adapters.key_wrappers import FileKeys, key_wrapper
from services.gateway.app.data_keys import FRESH_S, RETIRED_S, DataKeys, KeysUnreadable, TenantClosed
from services.gateway.app.sealing import require_keys
from services.kernel.config import SettingsError
from tests.fakes.fleet import FakeClock
from tests.fakes.memory_store import MemoryStore
from tests.fakes.sealing import OPERATOR_KEY, OTHER_KEY, data_keys, key_file


async def secret_of(keys: DataKeys, tenant: str = "acme") -> bytes:
    return (await keys.for_writing(tenant)).newest.secret


async def test_a_tenant_keeps_its_key_over_a_restart_and_no_two_have_the_same(tmp_path: Path) -> None:
    secret = await secret_of(data_keys(tmp_path / "keys"))
    again = data_keys(tmp_path / "keys")
    assert await secret_of(again) == secret
    assert await secret_of(again, "other") != secret


async def test_a_vault_shows_no_key(tmp_path: Path) -> None:
    secret = await secret_of(data_keys(tmp_path / "keys"))
    stored = (tmp_path / "keys" / "acme.json").read_bytes()
    assert secret not in stored
    assert secret.hex().encode() not in stored
    assert (tmp_path / "keys" / "acme.json").stat().st_mode & 0o077 == 0


async def test_gateways_that_start_at_once_agree_on_a_key(tmp_path: Path) -> None:
    ones = [data_keys(tmp_path / "keys") for _ in range(5)]
    assert len({await secret_of(each) for each in ones}) == 1


async def test_a_wrong_operator_key_is_refused_at_the_start(tmp_path: Path) -> None:
    store = MemoryStore()
    await require_keys(store, data_keys(tmp_path / "keys"))
    with pytest.raises(SettingsError, match=r"wrapped with the operator's key [0-9a-f]{16}, which is not in"):
        await require_keys(store, data_keys(tmp_path / "keys", OTHER_KEY))


async def test_a_sealed_store_is_refused_without_the_key(tmp_path: Path) -> None:
    store = MemoryStore()
    await require_keys(store, data_keys(tmp_path / "keys"))
    with pytest.raises(SettingsError, match="FANLIGHT_GATEWAY_SEAL_KEY_FILE: this store is sealed"):
        await require_keys(store, None)


async def test_a_damaged_mark_of_a_sealed_store_is_refused_with_and_without_the_key(tmp_path: Path) -> None:
    store = MemoryStore()
    await store.create("seals", "vault", b"damaged")
    for keys in (None, data_keys(tmp_path / "keys")):
        with pytest.raises(SettingsError, match="seals/vault, which names its vault, is damaged"):
            await require_keys(store, keys)


async def test_missing_wrapped_keys_are_not_replaced_by_new_ones(tmp_path: Path) -> None:
    store = MemoryStore()
    await require_keys(store, data_keys(tmp_path / "keys"))
    with pytest.raises(SettingsError, match="are missing; put them back"):
        await require_keys(store, data_keys(tmp_path / "elsewhere"))
    assert not list((tmp_path / "elsewhere").glob("*.json"))


async def test_the_wrapped_keys_of_another_store_are_refused(tmp_path: Path) -> None:
    store = MemoryStore()
    await require_keys(store, data_keys(tmp_path / "keys"))
    await require_keys(MemoryStore(), data_keys(tmp_path / "others"))
    with pytest.raises(SettingsError, match="belong to another store"):
        await require_keys(store, data_keys(tmp_path / "others"))


@pytest.mark.parametrize("damage", [b"", b"{", b'{"tenant":"acme","keys":[],"made":1}', b"\xff" * 100])
async def test_a_damaged_entry_is_an_error_that_costs_no_other_tenant(tmp_path: Path, damage: bytes) -> None:
    await secret_of(data_keys(tmp_path / "keys"))
    (tmp_path / "keys" / "acme.json").write_bytes(damage)
    keys = data_keys(tmp_path / "keys")
    with pytest.raises(KeysUnreadable, match="acme"):
        await keys.for_writing("acme")
    assert (tmp_path / "keys" / "acme.json").read_bytes() == damage
    await keys.for_writing("other")
    assert {each.tenant: bool(each.fault) for each in await keys.figures()} == {"acme": True, "other": False}


async def test_a_changed_wrapped_key_is_an_error(tmp_path: Path) -> None:
    await secret_of(data_keys(tmp_path / "keys"))
    path = tmp_path / "keys" / "acme.json"
    entry = json.loads(path.read_text())
    wrapped = entry["keys"][0]["wrapped"]
    entry["keys"][0]["wrapped"] = ("B" if wrapped[0] == "A" else "A") + wrapped[1:]
    path.write_text(json.dumps(entry))
    with pytest.raises(KeysUnreadable, match="was changed"):
        await data_keys(tmp_path / "keys").get("acme")


async def test_the_entry_of_another_tenant_is_refused(tmp_path: Path) -> None:
    keys = data_keys(tmp_path / "keys")
    await keys.for_writing("other")
    (tmp_path / "keys" / "acme.json").write_bytes((tmp_path / "keys" / "other.json").read_bytes())
    with pytest.raises(KeysUnreadable, match="another tenant's"):
        await keys.get("acme")


async def test_an_entry_that_vanishes_is_not_replaced_by_a_new_key(tmp_path: Path) -> None:
    clock = FakeClock()
    keys = data_keys(tmp_path / "keys", clock=clock)
    secret = await secret_of(keys)
    (tmp_path / "keys" / "acme.json").rename(tmp_path / "away")
    clock.advance(FRESH_S + 1)
    with pytest.raises(KeysUnreadable, match="vanished"):
        await keys.for_writing("acme")
    (tmp_path / "away").rename(tmp_path / "keys" / "acme.json")
    assert await secret_of(keys) == secret


async def test_a_folder_that_is_gone_is_not_one_without_keys(tmp_path: Path) -> None:
    keys = data_keys(tmp_path / "keys")
    (tmp_path / "keys").rmdir()
    with pytest.raises(Unavailable, match="wrapped data keys"):
        await keys.for_writing("acme")


async def test_the_operators_key_rotates_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    store = MemoryStore()
    before = data_keys(tmp_path / "keys")
    await require_keys(store, before)
    secrets = {name: await secret_of(before, name) for name in ("a", "b", "c")}
    both = data_keys(tmp_path / "keys", OTHER_KEY, OPERATOR_KEY)
    # Killed after the first one.
    assert await both._rewrap("a")
    half = {each.tenant: each.wrapped_by for each in await both.figures()}
    assert half["a"] != half["b"]
    again = data_keys(tmp_path / "keys", OTHER_KEY, OPERATOR_KEY)
    await require_keys(store, again)
    assert {name: await secret_of(again, name) for name in secrets} == secrets
    # b, c and the vault's own.
    assert await again.rewrap() == 3
    assert await again.rewrap() == 0
    after = data_keys(tmp_path / "keys", OTHER_KEY)
    await require_keys(store, after)
    assert {name: await secret_of(after, name) for name in secrets} == secrets


async def test_a_running_gateway_takes_in_a_key_that_is_added_to_the_file(tmp_path: Path) -> None:
    file = key_file(tmp_path / "operator")
    keys = DataKeys(FolderVault(tmp_path / "keys"), FileKeys(file), FakeClock(), os.urandom)
    await keys.for_writing("acme")
    key_file(tmp_path / "operator", OTHER_KEY, OPERATOR_KEY)
    assert await keys.rewrap() == 1
    (acme,) = await keys.figures()
    assert acme.wrapped_by == {keys.wrapped_by}


async def test_an_unreadable_key_file_stops_no_running_gateway(tmp_path: Path) -> None:
    file = key_file(tmp_path / "operator")
    keys = DataKeys(FolderVault(tmp_path / "keys"), FileKeys(file), FakeClock(), os.urandom)
    secret = await secret_of(keys)
    file.unlink()
    assert await keys.rewrap() == 0
    assert await secret_of(keys) == secret


async def test_a_new_data_key_is_used_everywhere_within_seconds_and_the_old_one_reads_on(tmp_path: Path) -> None:
    clock = FakeClock()
    ours, theirs = (data_keys(tmp_path / "keys", clock=clock) for _ in range(2))
    old = (await theirs.for_writing("acme")).newest
    new = (await ours.rotate("acme")).newest
    assert (old.number, new.number) == (1, 2)
    clock.advance(FRESH_S + 1)
    seen = await theirs.for_writing("acme")
    assert seen.newest == new
    assert seen.by_number[1] == old


async def test_an_older_key_goes_when_no_data_has_it_and_no_write_can_be_on_its_way(tmp_path: Path) -> None:
    clock = FakeClock()
    keys = data_keys(tmp_path / "keys", clock=clock)
    await keys.for_writing("acme")
    await keys.rotate("acme")
    assert await keys.drop_unused("acme", frozenset()) == 0
    clock.advance(RETIRED_S + 1)
    assert await keys.drop_unused("acme", frozenset({1})) == 0
    assert await keys.drop_unused("acme", frozenset({2})) == 1
    after = await keys.get("acme")
    assert after is not None
    assert list(after.by_number) == [2]


async def test_a_destroyed_key_is_gone_at_every_gateway_within_seconds(tmp_path: Path) -> None:
    clock = FakeClock()
    ours, theirs = (data_keys(tmp_path / "keys", clock=clock) for _ in range(2))
    secret = await secret_of(theirs)
    assert await ours.destroy("acme")
    assert not await ours.destroy("acme")
    clock.advance(FRESH_S + 1)
    assert await theirs.get("acme") is None
    with pytest.raises(TenantClosed):
        await theirs.for_writing("acme")
    clock.advance(3_601)
    again = await theirs.for_writing("acme")
    assert again.newest.secret != secret
    # Its number was never used before.
    assert again.current == 2


async def test_who_has_no_key_cannot_rotate_it(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await data_keys(tmp_path / "keys").rotate("acme")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("", "has no key"), ("abc", "line 1: must be 64 hex"), ("00" * 32, "can be guessed"), ("# none", "has no key")],
)
def test_a_key_file_without_a_sound_key_is_refused(tmp_path: Path, text: str, wrong: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(SettingsError, match=wrong) as caught:
        key_wrapper(tmp_path / "key", "")
    assert "00" * 32 not in str(caught.value)


def test_a_missing_key_file_and_an_unknown_service_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        key_wrapper(tmp_path / "none", "")
    with pytest.raises(SettingsError, match="no installed package offers 'acme'"):
        key_wrapper(None, "acme:argument")
    with pytest.raises(SettingsError, match="set either"):
        key_wrapper(key_file(tmp_path), "acme")


async def test_a_key_service_that_hangs_on_one_tenants_key_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tenant in ("acme", "globex"):
        await secret_of(data_keys(tmp_path / "keys"), tenant)
    keys, unwrap, asked = data_keys(tmp_path / "keys"), FileKeys.unwrap, asyncio.Event()

    async def hanging(self: FileKeys, wrapped_by: str, wrapped: bytes, context: bytes) -> bytes:
        if b"acme" in context:
            asked.set()
            await asyncio.Event().wait()
        return await unwrap(self, wrapped_by, wrapped, context)

    monkeypatch.setattr(FileKeys, "unwrap", hanging)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        waiting = group.create_task(keys.get("acme"))
        await asked.wait()
        assert await keys.get("globex") is not None
        waiting.cancel()
