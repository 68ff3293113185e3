"""Addresses of web pages about a file, which people copy from the browser, and of the file itself. Pure."""

from urllib.parse import urlsplit, urlunsplit

HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com"})
GITHUB_HOSTS = frozenset({"github.com", "www.github.com"})
# ORG/REPO comes before; two parts follow: a revision and a path.
BLOB = "blob"


def file_addresses(url: str, *, hub: str) -> tuple[str, ...]:
    """Where the file may be, best first; the address itself unless it names a page of a hub.

    `ORG/REPO/blob/REVISION/PATH` is a page of `hub`, of Hugging Face or of GitHub; of another host it is only likely.
    """
    parts = urlsplit(url)
    host, names = (parts.hostname or "").lower(), parts.path.split("/")
    if BLOB not in names[3:-2]:
        return (url,)
    names[names.index(BLOB, 3)] = "raw" if host in GITHUB_HOSTS else "resolve"
    file = urlunsplit(parts._replace(path="/".join(names)))
    is_page = host in HUB_HOSTS | GITHUB_HOSTS or url.startswith(f"{hub}/")
    return (file,) if is_page else (file, url)
