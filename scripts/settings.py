"""Prints docs/settings.md from the settings classes: `make settings`."""

import sys
from collections.abc import Iterator

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from services.diffusion.config import DiffusionSettings
from services.gateway.config import GatewaySettings
from services.kernel.config import CommonSettings, GatewayCommonSettings
from services.preprocessor.config import PreprocessorSettings
from services.weights.settings import WeightsSettings
from services.worker.loop import WorkerSettings

HEAD = """# Settings

All settings are environment variables. An unknown name that starts with `FANLIGHT_` is an error. A service reads the
common settings and its own, and ignores those of other services. A token can also be read from a file (`..._FILE`).

The command line reads `FANLIGHT_GATEWAY` (the gateway's address), `FANLIGHT_TOKEN` or `FANLIGHT_TOKEN_FILE`,
`FANLIGHT_TLS_CA_FILE`, `FANLIGHT_TLS_CERT_FILE` and `FANLIGHT_TLS_KEY_FILE`, `FANLIGHT_PLAIN_TEXT` and
`FANLIGHT_GRPC_PROXY`. `HTTPS_PROXY`, `NO_PROXY`, `SSL_CERT_FILE` and their like are in
[operations](operations.md#proxies-and-certificates).

This page is generated from the settings classes by `make settings`.
"""

SECTIONS: list[tuple[str, list[type[BaseSettings]]]] = [
    ("Common to all services", [CommonSettings]),
    ("Gateway", [GatewayCommonSettings, GatewaySettings]),
    ("Preprocessor", [PreprocessorSettings]),
    ("Diffusion", [DiffusionSettings]),
    ("Worker: the lease loop of preprocessor and diffusion", [WorkerSettings]),
    ("Weights", [WeightsSettings]),
]


def rows(kind: type[BaseSettings]) -> Iterator[str]:
    prefix = kind.model_config.get("env_prefix", "")
    for name, field in kind.model_fields.items():
        if name not in kind.__annotations__:
            continue  # inherited, and listed with the class that has it
        assert field.description, f"{kind.__name__}.{name} has no description"
        yield f"| `{prefix}{name.upper()}` | {default_of(field)} | {field.description} |"


def default_of(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "depends on the machine"
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None or value == "" or isinstance(value, SecretStr):
        return ""
    return f"`{value}`"


def page() -> str:
    parts = [HEAD]
    for title, kinds in SECTIONS:
        lines = [row for kind in kinds for row in rows(kind)]
        parts.append("\n".join([f"## {title}", "", "| name | default | meaning |", "|---|---|---|", *lines, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
