"""How the gateway's listeners are encrypted: the operator's certificate, one of its own, or plain text.

Beyond loopback TLS is the default; plain text there must be asked for by name.
"""

import datetime
import socket
from dataclasses import dataclass

from cryptography import x509

from fanlight.channel import PLAIN_TEXT_SETTING, PLAIN_TEXT_WARNING
from fanlight.contract.join_code import OWN_NAME
from services.gateway.adapters.certificates import CertificateFiles, authority_digest, own_certificate
from services.gateway.config import GatewaySettings
from services.kernel.config import GatewayCommonSettings, SettingsError
from services.kernel.grpc_server import is_loopback, require_pair, split_address
from services.kernel.logs import get_logger

log = get_logger()

SQLITE = "sqlite"
_EVERYWHERE = frozenset({"0.0.0.0", "::", ""})


@dataclass(frozen=True, slots=True, kw_only=True)
class Encryption:
    common: GatewayCommonSettings
    # Made by the gateway; None: the common settings' certificate, or none.
    own: CertificateFiles | None = None
    # As in JoinCode.
    authority: str = ""
    has_own_name: bool = False

    def settings_of(self, address: str) -> GatewayCommonSettings:
        """The common settings with the certificate of the listener there. Loopback has one only where it was given."""
        is_asked_for = self.common.tls_client_ca_file is not None
        if self.own is None or (is_loopback(address) and not is_asked_for):
            return self.common
        files = {"tls_cert_file": self.own.chain, "tls_key_file": self.own.key}
        return self.common.model_copy(update=files)


def encryption_of(
    settings: GatewaySettings, common: GatewayCommonSettings, *, now: datetime.datetime | None = None
) -> Encryption:
    """SettingsError where certificates cannot be read or made, or must not be."""
    if common.certificate is not None:
        require_pair(*common.certificate)
        chain = common.certificate[0].read_bytes()
        return Encryption(common=common, authority=authority_digest(chain), has_own_name=_has_own_name(chain))
    outside = [each for each in (settings.grpc, settings.http) if not is_loopback(each)]
    if common.plain_text:
        return _plain(common, outside)
    if not outside and common.tls_client_ca_file is None:
        return Encryption(common=common)
    if settings.store != SQLITE:
        raise SettingsError(
            "FANLIGHT_GATEWAY_STORE: gateways that share a store need one certificate, for nodes trust one authority:"
            f" set FANLIGHT_TLS_CERT_FILE and FANLIGHT_TLS_KEY_FILE, or {PLAIN_TEXT_SETTING}=true behind a TLS proxy"
        )
    moment = now or datetime.datetime.now(datetime.UTC)
    files = own_certificate(settings.data_dir, _names(settings), now=moment)
    log.info("own_certificate", authority=str(files.authority), listeners=outside)
    digest = authority_digest(files.chain.read_bytes())
    grpc_is_plain = is_loopback(settings.grpc) and common.tls_client_ca_file is None
    return Encryption(
        common=common, own=files, authority="" if grpc_is_plain else digest, has_own_name=not grpc_is_plain
    )


def _plain(common: GatewayCommonSettings, outside: list[str]) -> Encryption:
    if common.tls_client_ca_file is not None:
        raise SettingsError(
            f"FANLIGHT_TLS_CLIENT_CA_FILE: client certificates need TLS, and {PLAIN_TEXT_SETTING} is set"
        )
    if outside:
        log.warning("plain_text_beyond_loopback", listeners=outside, advice=PLAIN_TEXT_WARNING)
    return Encryption(common=common)


def _names(settings: GatewaySettings) -> set[str]:
    """How clients may call the gateway: as the operator says, where it listens, and the host's name."""
    names = {each.strip() for each in f"{settings.names},{settings.http_names}".split(",")}
    advertised = settings.address.split(",") if settings.address else []
    hosts = {split_address(each)[0] for each in (settings.grpc, settings.http, *advertised)}
    return {each for each in (names | hosts | {socket.gethostname()}) - _EVERYWHERE if _can_be_named(each)}


def _can_be_named(name: str) -> bool:
    """Not every host name can be in a certificate."""
    try:
        name.encode("ascii")
    except UnicodeEncodeError:
        log.warning("name_not_in_certificate", name=name, advice="write it as punycode in FANLIGHT_GATEWAY_NAMES")
        return False
    return True


def _has_own_name(chain: bytes) -> bool:
    """Whether it is a certificate that a gateway made itself, such as one that is shared by several."""
    try:
        certificate = x509.load_pem_x509_certificates(chain)[0]
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return False
    return OWN_NAME in names.get_values_for_type(x509.DNSName)
