"""Certificates over the years: when they run out, when their files were changed, and why a broker was not trusted."""

from __future__ import annotations

import hashlib
import logging
import ssl
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from agent.mqtt.client import MqttSettings, credential_files, load_credentials
from agent.publishing.messages import Alarm
from calibration.errors import SettingsError

log = logging.getLogger(__name__)

CHECK_EVERY_S = 10.0
WARN_BEFORE = timedelta(days=30)

# X509_verify_cert(3): what OpenSSL found wrong with the broker's certificate
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_ISSUERS = (18, 19, 20, 21)
_OTHER_NAMES = (62, 64)

# alerts by which the broker says what it found wrong with ours
_ALERTS = {
    "alert certificate expired": "the broker says that our certificate has expired: put a new one into mqtt.cert_file",
    "alert certificate revoked": "the broker says that our certificate was revoked: put a new one into mqtt.cert_file",
    "alert unknown ca": "the broker does not know the authority of our certificate: check mqtt.cert_file",
    "alert certificate required": "the broker wants a certificate: set mqtt.cert_file and key_file",
    "alert bad certificate": "the broker does not accept our certificate: check mqtt.cert_file, and its clock",
    "alert handshake failure": "the broker and we have no cipher in common, or it wants a certificate",
    "eof occurred in violation of protocol": "the broker hung up on our TLS: it wants a certificate (mqtt.cert_file), "
    "or it just ended",
    "alert protocol version": "the broker does not speak TLS 1.2 or later",
}


def digest(paths: Iterable[Path]) -> bytes:
    """Return what changes whenever a file among paths is changed, removed, or made unreadable."""
    state = hashlib.sha256()
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            content = f"unreadable: {error.errno}".encode()
        state.update(hashlib.sha256(content).digest())
    return state.digest()


def expiry_alarms(paths: Iterable[Path], now_utc: datetime) -> list[Alarm]:
    """Return an alarm for each file with a certificate that has run out, or will within WARN_BEFORE.

    A file that holds no certificate raises none: whoever loads it says so.
    """
    alarms = []
    for path in paths:
        end_utc = expires_utc(path)
        if end_utc is None or end_utc - now_utc > WARN_BEFORE:
            continue
        day = end_utc.date().isoformat()
        days = (end_utc - now_utc).days
        when = f"expired on {day}" if end_utc <= now_utc else f"expires on {day}, in {days} days"
        alarms.append(Alarm("certificate_expires", f"certificate {path.name} {when}: put a new one in its place"))
    return alarms


def expires_utc(path: Path) -> datetime | None:
    """Return when the first of a PEM file's certificates runs out; None if there is none."""
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError):
        return None
    return min((certificate.not_valid_after_utc for certificate in found), default=None)


def likely_cause(error: BaseException | str, *, now_utc: datetime | None = None) -> str:
    """Return why a connection failed, in words that help: what TLS says is true, but rarely the cause."""
    clock = f"our clock says {(now_utc or datetime.now(UTC)).isoformat(timespec='minutes')}"
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == _NOT_YET_VALID:
            return f"the broker's certificate is not valid yet; {clock}: is it right?"
        if error.verify_code == _EXPIRED:
            return f"the broker's certificate has expired; {clock}: if that is right, the broker needs a new one"
        if error.verify_code in _UNKNOWN_ISSUERS:
            return f"the broker's certificate is of an unknown authority: check mqtt.ca_file ({error.verify_message})"
        if error.verify_code in _OTHER_NAMES:
            return f"the broker's certificate is for another name: check mqtt.host ({error.verify_message})"
        return f"the broker's certificate is not accepted: {error.verify_message}"
    text = str(error)
    known = next((cause for alert, cause in _ALERTS.items() if alert in text.lower()), None)
    if known is None and isinstance(error, ssl.SSLError) and "WRONG_VERSION_NUMBER" in text:
        known = "the broker does not speak TLS on this port: check mqtt.port"
    return text if known is None else f"{known} ({clock})"


class CredentialWatch:
    """The credentials in use, and whether their files were changed since. One thread."""

    def __init__(self, settings: MqttSettings) -> None:
        """Raises SettingsError as load_credentials."""
        self._settings = settings
        self._files = credential_files(settings)
        self._certificates = tuple(path for path in (settings.cert_file, settings.ca_file) if path is not None)
        self._check_at_s = time.monotonic() + CHECK_EVERY_S
        self._digest = digest(self._files)
        self.current = load_credentials(settings)
        self._unusable = ""
        self.alarms: list[Alarm] = []
        self._raise_alarms()

    def changed(self, now_s: float) -> bool:
        """Look at the files if it is time; True if `current` is new. What cannot be used changes nothing but alarms."""
        if not self._files or now_s < self._check_at_s:
            return False
        self._check_at_s = now_s + CHECK_EVERY_S
        found = digest(self._files)
        is_new = found != self._digest
        if is_new:
            self._digest = found
            is_new = self._load()
        self._raise_alarms()
        return is_new

    def _load(self) -> bool:
        try:
            self.current = load_credentials(self._settings)
        except SettingsError as error:
            self._unusable = f"changed certificates or password cannot be used: {error}"
            return False
        self._unusable = ""
        return True

    def _raise_alarms(self) -> None:
        """Renew the alarms; log the new ones, which a broker that does not let us in would not hear of."""
        unusable = [Alarm("credentials_unusable", f"{self._unusable}; the old ones stay")] if self._unusable else []
        alarms = unusable + expiry_alarms(self._certificates, datetime.now(UTC))
        for alarm in alarms:
            if alarm not in self.alarms:
                log.error("%s", alarm.detail)
        self.alarms = alarms
