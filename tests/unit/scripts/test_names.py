"""Which names a list of renames must account for, and how it can be wrong."""

import pytest

from scripts.names import TABLES, flattened, json_names, problems, removed_without_reason

NOTHING = dict.fromkeys(TABLES, frozenset())


def found(table, before, now, renames):
    """Problems where only one table has names."""
    tables = {**flattened({}), table: renames}
    return problems(tables, {**NOTHING, table: frozenset(before)}, {**NOTHING, table: frozenset(now)})


def test_what_is_gone_is_printed_as_the_line_to_add():
    lines = found("settings", {"FANLIGHT_A_PICTURE_BYTES", "FANLIGHT_B"}, {"FANLIGHT_A_IMAGE_BYTES"}, {})

    assert lines == [
        "add to [settings]:",
        '"FANLIGHT_A_PICTURE_BYTES" = "FANLIGHT_A_IMAGE_BYTES"',
        '"FANLIGHT_B" = ""',
    ]


def test_a_name_that_was_there_before_is_no_guess():
    assert found("settings", {"FANLIGHT_AB", "FANLIGHT_AC"}, {"FANLIGHT_AC"}, {})[1:] == ['"FANLIGHT_AB" = ""']


def test_a_module_that_moved_is_guessed_by_its_own_name():
    lines = found("modules", {"a.b.c", "a.d"}, {"a.e.c", "a.dd"}, {})

    assert lines[1:] == ['"a.b.c" = "a.e.c"', '"a.d" = ""']


def test_listed_and_removed_names_are_accounted_for():
    assert found("json", {"picture", "eta"}, {"image"}, {"picture": "image", "eta": ""}) == []


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"never": "image"}, "there was no such name"),
        ({"seed": "image"}, "still there"),
        ({"picture": "photo"}, 'there is no "photo"'),
    ],
)
def test_a_wrong_entry_is_named(entry, words):
    [line] = found("json", {"picture", "seed"}, {"image", "seed"}, {"picture": "image", **entry})

    assert words in line


def test_a_renamed_message_accounts_for_fields_that_keep_their_names_and_for_no_others():
    tables = {**flattened({}), "proto.messages": {"p.Old": "p.New"}}
    before = {"proto.messages": frozenset({"p.Old"}), "proto.fields": frozenset({"p.Old.a", "p.Old.picture"})}
    now = {"proto.messages": frozenset({"p.New"}), "proto.fields": frozenset({"p.New.a", "p.New.image"})}

    lines = problems(tables, {**NOTHING, **before}, {**NOTHING, **now})

    assert lines == ["add to [proto.fields]:", '"p.Old.picture" = "p.New.image"']


def test_a_removed_command_takes_its_options_with_it_and_a_removed_package_no_modules():
    assert found("cli", {"f dead", "f dead --json"}, {"f"}, {"f dead": ""}) == []
    assert found("modules", {"a.b", "a.b.c"}, {"a"}, {"a.b": ""}) == ["add to [modules]:", '"a.b.c" = ""']


def test_a_table_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"proto\.field: must be one of"):
        flattened({"proto": {"field": {}}})


def test_removed_names_need_a_comment():
    text = '[json]\n"a" = ""\n"b" = "" # merged\n# gone with it\n"c" = ""\n"d" = ""\n"e" = "f"\n"g" = ""\n'

    assert removed_without_reason(text) == ['"a" = ""', '"g" = ""']


def test_routes_parameters_and_keys_are_the_json_names():
    schema = {"type": "object", "properties": {"seed": {}, "images": {"items": {"properties": {"url": {}}}}}}
    parameters = [{"in": "query", "name": "wait"}, {"in": "path", "name": "id"}]
    document = {"paths": {"/v1/jobs": {"get": {"parameters": parameters}}}, "components": {"schemas": {"Job": schema}}}

    assert set(json_names(document)) == {"GET /v1/jobs", "GET /v1/jobs ?wait", "seed", "images", "url"}
