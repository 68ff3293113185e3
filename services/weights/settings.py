"""Settings of the weights' store and fetch: `FANLIGHT_WEIGHTS_*`."""

from pathlib import Path

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024


class WeightsSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FANLIGHT_WEIGHTS_", extra="ignore", frozen=True)

    dir: Path = Field(Path("~/.cache/fanlight/weights"), description="Where weights are kept.")
    offline: bool = Field(False, description="Fetch nothing: what is not held is an error.")
    budget_bytes: int = Field(0, ge=0, description="Most bytes kept; the least recently used go first. 0: no limit.")
    bandwidth_bps: int = Field(0, ge=0, description="Most bits a second fetched, all processes together. 0: no limit.")
    daily_bytes: int = Field(0, ge=0, description="Most bytes fetched in a day (UTC), all processes. 0: no limit.")
    connections: int = Field(8, ge=1, le=64, description="Most connections for one file.")
    piece_bytes: int = Field(16 * MIB, ge=64 * 1024, description="Most bytes that one request asks for.")
    stall_s: float = Field(15.0, gt=0, description="How long a connection may send nothing.")
    slow_bps: int = Field(500_000, ge=0, description="A slower source is left for the next one, if there is one.")
    retries: int = Field(8, ge=0, description="Failures in a row, without a byte between, before a source is left.")
    allow_pickle: bool = Field(False, description="Take pickles that no catalog entry pins by sha256.")
    catalog_dir: Path | None = Field(None, description="A folder of the operator's own catalog files (*.json).")
    mirrors: str = Field(
        "", description="Where `fanlight weights publish` has written, as https:// or s3:// addresses with commas."
    )
    url_hosts: str = Field("", description="Hosts, with commas, that https:// references may name. Empty: any.")
    hf_endpoint: str = Field("https://huggingface.co", description="The hub that hf: references name.")
    hf_token: SecretStr | None = Field(None, description="Token for the hub; sent to no other host.")
    civitai_endpoint: str = Field("https://civitai.com", description="The site that civitai references name.")
    civitai_token: SecretStr | None = Field(None, description="Token for Civitai; sent to no other host.")

    s3_endpoint: str = Field("", description="The server that s3:// references name. Empty: Amazon's.")
    s3_region: str = Field("", description="Its region. Empty: what the AWS settings of the machine say.")

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
