"""What the first and last bytes of an unpinned file say about it."""

import pytest

from services.weights.errors import ForeignAnswer
from services.weights.references.tensors import BadHeader
from services.weights.transfer.gate import HEAD_BYTES, foreign_in, refuse_foreign, refuse_unsound


@pytest.mark.parametrize(
    "page",
    [
        b"<!doctype html><title>x",
        b"\r\n\t<HTML>",
        b"\xef\xbb\xbf<!DOCTYPE HTML PUBLIC '-//W3C//DTD'>",
        b"<!-- a --><!-- b --><head>",
        b"<?xml version='1.0'?><!DOCTYPE html>",
        b"<script>location='/login'</script>",
    ],
)
def test_pages_are_seen_under_any_name_but_a_pages(page):
    for name in ("a.safetensors", "config.json", "vocab.txt", "download"):
        assert foreign_in(page, 10_000, name) == "a web page"
    assert foreign_in(page, 10_000, "index.html") == ""


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b'{"architectures": ["UNet"], "message": "x"}', "config.json"),
        (b"[1, 2]", "ids.json"),
        (b"<svg></svg>", "a.svg"),
        (b"Apache License", "LICENSE"),
        (b"{not json", "merges.txt"),
        (b"version https://example.org/spec", "a.txt"),
        (b"\x80\x02}q\x00.", "a.pt"),
    ],
)
def test_sound_files_pass(head, name):
    assert foreign_in(head, len(head), name) == ""


def test_an_error_in_place_of_a_configuration_is_seen():
    body = b'{"error":"Repository not found","statusCode":404}'
    assert foreign_in(body, len(body), "config.json") == "a JSON error (Repository not found)"


def test_a_short_text_in_place_of_a_model_is_quoted():
    with pytest.raises(ForeignAnswer, match=r"files\.example answers with a text .'Not authorized'. instead of a\.bin"):
        refuse_foreign(b"Not authorized\n", 15, name="a.bin", url="https://files.example/a.bin")


def test_an_address_with_blob_in_it_is_pointed_at():
    with pytest.raises(ForeignAnswer, match="/blob/ instead of /resolve/"):
        refuse_foreign(b"<html>", 6, name="a.bin", url="https://files.example/blob/a.bin")


@pytest.mark.parametrize("head", [b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"])
def test_the_magic_of_a_pickle_is_a_zip_archives_or_a_protocols(head):
    head = head.ljust(HEAD_BYTES, b"\x00")
    refuse_unsound(head, b"PK\x05\x06", name="a.ckpt", host="h", header_fault="")


@pytest.mark.parametrize("head", [b"\x80\x01", b"\x80\x09", b"PK\x05\x06", b"", b"MZ"])
def test_other_bytes_are_no_pickle(head):
    with pytest.raises(BadHeader, match=r"a\.ckpt from h is neither a zip archive nor a pickle"):
        refuse_unsound(head, head, name="a.ckpt", host="h", header_fault="")
