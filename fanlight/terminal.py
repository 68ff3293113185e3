"""Other people's text on a terminal: names, prompts, failures and logs come from strangers' machines and files."""


def printable(text: str) -> str:
    """One line: what controls a terminal, or reorders its text, as an escape such as `\\x1b`."""
    return text if text.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def printable_lines(text: str) -> str:
    """The same with its line breaks and tabs, for tracebacks."""
    return "".join(each if each in "\n\t" else printable(each) for each in text)


def printable_json(text: str) -> str:
    """JSON with the same meaning, and escapes for what controls a terminal."""
    return text if text.isprintable() else "".join(each if each == "\n" else _json_escape(each) for each in text)


def _json_escape(each: str) -> str:
    if each.isprintable():
        return each
    units = each.encode("utf-16-be", errors="surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
