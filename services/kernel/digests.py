"""Digests and scopes; see fanlight.contract.digests."""

from fanlight.contract.digests import DEFAULT_SCOPE, digest_of, named, parse_digest, parse_scope

__all__ = ["DEFAULT_SCOPE", "digest_of", "named", "parse_digest", "parse_scope"]
