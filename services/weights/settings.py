"""Settings of the weight store and its downloads: `FANLIGHT_WEIGHTS_*`."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024


class WeightsSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FANLIGHT_WEIGHTS_", extra="ignore", frozen=True)

    dir: Path = Field(Path("~/.cache/fanlight/weights"), description="Folder of the weight store.")
    offline: bool = Field(False, description="Download nothing; weights that are not in the store are an error.")
    budget_bytes: int = Field(
        0, ge=0, description="Size limit of the store; the least recently used objects are evicted first. 0: no limit."
    )
    bandwidth_bps: int = Field(
        0, ge=0, description="Download limit in bits per second, all processes of the store together. 0: no limit."
    )
    daily_bytes: int = Field(
        0, ge=0, description="Download limit in bytes per day (UTC), all processes of the store together. 0: no limit."
    )
    connections: int = Field(8, ge=1, le=64, description="Maximum parallel connections for one file.")
    piece_bytes: int = Field(
        16 * MIB,
        ge=64 * 1024,
        description="Maximum bytes of one range request; fewer where a proxy cuts long answers off.",
    )
    slow_bps: int = Field(
        500_000,
        ge=0,
        description="A source slower than this many bits per second is replaced by the next source, if there is one.",
    )
    retries: int = Field(8, ge=0, description="Retries without progress before a source is given up.")
    allow_pickle: bool = Field(False, description="Allow pickles that no catalog entry pins by sha256.")
    catalog_dir: Path | None = Field(None, description="Folder with additional catalog files (*.json).")
    mirrors: str = Field(
        "",
        description="Mirrors written by `fanlight weights publish`: https:// or s3:// addresses, separated by commas.",
    )
    url_hosts: str = Field(
        "", description="Hosts that https:// references may use, separated by commas. Empty: any host."
    )
    hf_endpoint: str = Field("https://huggingface.co", description="Hub for hf: references.")
    hf_token: SecretStr | None = Field(None, description="Token for the hub; sent to no other host.")
    civitai_endpoint: str = Field("https://civitai.com", description="Civitai API for urn:air:...:civitai references.")
    civitai_token: SecretStr | None = Field(None, description="Token for Civitai; sent to no other host.")

    s3_endpoint: str = Field("", description="S3 server for s3:// references. Empty: AWS.")
    s3_region: str = Field("", description="S3 region. Empty: the AWS settings of the machine.")

    @field_validator("hf_endpoint", "civitai_endpoint")
    @classmethod
    def _no_slash(cls, value: str) -> str:
        if not value.startswith(("https://", "http://")):
            raise ValueError("must start with https:// or http://")
        return value.rstrip("/")

    @field_validator("dir")
    @classmethod
    def _expanded(cls, value: Path) -> Path:
        return value.expanduser()

    def mirror_bases(self) -> list[str]:
        return [each.strip().rstrip("/") for each in self.mirrors.split(",") if each.strip()]

    def allows(self, host: str) -> bool:
        hosts = {each.strip().lower() for each in self.url_hosts.split(",") if each.strip()}
        return not hosts or host.lower() in hosts

    def tokens(self) -> dict[str, str]:
        """Each endpoint's token, where one is set."""
        pairs = ((self.hf_endpoint, self.hf_token), (self.civitai_endpoint, self.civitai_token))
        return {endpoint: token.get_secret_value() for endpoint, token in pairs if token}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsLimits:
    """Limits of downloads that no operator sets."""

    # How long a connection may bring no data before it times out.
    stall_s: float = 15.0
