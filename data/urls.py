"""URLs in one spelling, so that two that name the same page are equal as text.

    rule                                                                    source
    blanks around it go; `\\`, tab and line ends inside go                    WHATWG URL, 4.4
    scheme and host in lower case; the host in IDNA's ASCII form             RFC 3986, 6.2.2.1; RFC 5891
    http becomes https: one page answers to both                             convention of crawlers
    a leading `www.` and a trailing dot of the host go                       convention of crawlers
    default ports (80, 443; ftp 21) go, and so do user and password          RFC 3986, 6.2.3
    percent-encoding: unreserved characters decoded, the rest in upper case  RFC 3986, 6.2.2.2
    characters outside ASCII, and blanks, are encoded as UTF-8               RFC 3987, 3.1
    `.` and `..` of the path are resolved; repeated slashes become one       RFC 3986, 5.2.4
    the trailing slash of the path goes, and so do index.html and the like   convention of crawlers
    the fragment goes, but for `#!` of old applications                      RFC 3986, 3.5
    parameters that track visitors or sessions go                            list below
    the others are sorted by name, those of one name keep their order        convention of crawlers

What does not look like a URL (no scheme and host) is only stripped of blanks.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")
NOT_ALLOWED = re.compile(r"[^!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]")
REMOVED = str.maketrans("", "", "\t\n\r")
LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
DEFAULT_PORTS = {"http": (80, 443), "https": (80, 443), "ftp": (21,)}  # http and https are one scheme here
INDEX_PAGES = frozenset(
    ["index.html", "index.htm", "index.php", "index.asp", "index.aspx", "index.jsp", "default.aspx"]
)
TRACKING = frozenset(
    ["fbclid", "gclid", "gclsrc", "dclid", "gbraid", "wbraid", "msclkid", "yclid", "twclid", "ttclid", "igshid", "igsh",
     "mc_cid", "mc_eid", "mkt_tok", "_ga", "_gl", "_hsenc", "_hsmi", "hsctatracking", "oly_anon_id", "oly_enc_id",
     "vero_id", "wickedid", "rb_clickid", "s_cid", "icid", "ncid", "cmpid", "ref_src", "ref_url", "spm", "scm",
     "phpsessid", "jsessionid", "aspsessionid", "sessionid", "sid", "cfid", "cftoken"]
)  # fmt: skip
TRACKING_BEGINNINGS = ("utm_", "pk_", "piwik_", "mtm_", "matomo_", "hsa_")
SESSION_IN_PATH = re.compile(r";(?:jsessionid|phpsessid|sid)=[^/?#;]*", re.IGNORECASE)


def normalised_url(url: str) -> str:
    """One spelling of a URL; see the rules above. Idempotent; what is no URL comes back stripped of blanks."""
    url = url.strip().translate(REMOVED)
    try:
        parts = urlsplit(url)
        host, port = _host(parts.hostname or ""), parts.port
    except ValueError:  # a port that is no number, an address in brackets that is none
        return url
    scheme = parts.scheme.lower()
    if not scheme or not host:
        return url
    shown = "" if port is None or port in DEFAULT_PORTS.get(scheme, ()) else f":{port}"
    query = _query(parts.query)
    fragment = f"#{_encoded(parts.fragment)}" if parts.fragment.startswith("!") else ""
    scheme = "https" if scheme == "http" else scheme
    return f"{scheme}://{host}{shown}{_path(parts.path)}{'?' + query if query else ''}{fragment}"


def _host(host: str) -> str:
    host = host.lower()
    if ":" in host:
        return f"[{host}]"
    if not host.isascii():
        try:
            host = host.encode("idna").decode().lower()
        except UnicodeError:  # a label that IDNA does not allow: the name as it is written
            host = _encoded(host).lower()
    host = host.rstrip(".")
    while host.startswith("www.") and host.count(".") > 1:
        host = host[4:]
    return host


def _path(path: str) -> str:
    segments: list[str] = []
    for segment in SESSION_IN_PATH.sub("", _encoded(path)).split("/"):
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment)
    while segments and segments[-1].lower() in INDEX_PAGES:
        segments.pop()
    return "".join(f"/{segment}" for segment in segments)


def _query(query: str) -> str:
    pairs = [p for p in _encoded(query).split("&") if p and not _tracks(p.partition("=")[0].lower())]
    return "&".join(sorted(pairs, key=lambda p: p.partition("=")[0]))


def _tracks(name: str) -> bool:
    return name in TRACKING or name.startswith(TRACKING_BEGINNINGS)


def _encoded(text: str) -> str:
    """Percent-encoding in its one spelling."""
    text = NOT_ALLOWED.sub(_as_utf8, text)
    return ENCODED.sub(_respelt, LONE_PERCENT.sub("%25", text)) if "%" in text else text


def _as_utf8(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))


def _respelt(match: re.Match[str]) -> str:
    character = chr(int(match[1], 16))
    return character if character in UNRESERVED else match[0].upper()
