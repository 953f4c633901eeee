import ssl
from datetime import UTC, datetime, timedelta

import pytest

from agent.mqtt.certificates import CredentialWatch, digest, expires_utc, expiry_alarms, likely_cause
from agent.mqtt.client import MqttSettings
from calibration.errors import SettingsError
from tests.certificates import Authority

NOW = datetime(2026, 11, 22, 10, 30, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def settings(tmp_path, authority):
    cert, key = authority.issue("station")
    password = tmp_path / "password"
    password.write_text("first\n", encoding="utf-8")
    return MqttSettings(
        topic="a", ca_file=authority.file, cert_file=cert, key_file=key, username="u", password_file=password
    )


def test_the_digest_changes_with_content_absence_and_order(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    absent = digest([one, two])
    two.write_bytes(b"2")
    both = digest([one, two])
    assert len({absent, both, digest([two, one]), digest([])}) == 4
    assert digest([one, two]) == both


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        (timedelta(days=31), None),
        (timedelta(days=29, hours=1), "expires on {day}, in 29 days"),
        (timedelta(hours=1), "expires on {day}, in 0 days"),
        (timedelta(hours=-1), "expired on {day}"),
    ],
)
def test_a_certificate_raises_an_alarm_from_30_days_before_its_end(authority, ends, text):
    now = datetime.now(UTC)
    cert, _ = authority.issue("station", begins=timedelta(days=-2), ends=ends)
    alarms = expiry_alarms([cert], now)
    day = (now + ends).date().isoformat()
    assert [alarm.code for alarm in alarms] == ([] if text is None else ["certificate_expires"])
    assert all(text.format(day=day) in alarm.detail and "station.crt" in alarm.detail for alarm in alarms)


def test_of_a_bundle_the_first_to_run_out_counts(tmp_path, authority):
    early, _ = authority.issue("early", ends=timedelta(days=3))
    late, _ = authority.issue("late", ends=timedelta(days=300))
    bundle = tmp_path / "bundle.crt"
    bundle.write_bytes(late.read_bytes() + early.read_bytes())
    assert expires_utc(bundle) == expires_utc(early)


def test_what_is_no_certificate_raises_no_alarm(tmp_path):
    nonsense = tmp_path / "nonsense"
    nonsense.write_bytes(b"nothing")
    assert expiry_alarms([nonsense, tmp_path / "absent"], NOW) == []


def verification_error(code):
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, "as OpenSSL says it"
    return error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (verification_error(9), "not valid yet; our clock says 2026-11-22T10:30+00:00: is it right?"),
        (verification_error(10), "has expired; our clock says 2026-11-22T10:30+00:00: if that is right"),
        (verification_error(19), "unknown authority: check mqtt.ca_file"),
        (verification_error(20), "unknown authority: check mqtt.ca_file"),
        (verification_error(62), "another name: check mqtt.host"),
        (verification_error(64), "another name: check mqtt.host"),
        (verification_error(7), "not accepted: as OpenSSL says it"),
        (ssl.SSLError(1, "[SSL] tlsv13 alert certificate required"), "set mqtt.cert_file and key_file"),
        (ssl.SSLError(1, "[SSL: SSLV3_ALERT_CERTIFICATE_EXPIRED] sslv3 alert certificate expired"), "our certificate"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), "does not speak TLS on this port"),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
    ],
)
def test_the_likely_cause_is_named(error, cause):
    assert cause in likely_cause(error, now_utc=NOW)


def test_credentials_are_loaded_anew_when_a_file_changes_and_not_before_it_is_time(settings, authority):
    watch = CredentialWatch(settings)
    used = watch.current
    assert not watch.changed(1e9)
    settings.password_file.write_text("second\n", encoding="utf-8")
    assert not watch.changed(1e9 + 1)
    assert watch.changed(1e9 + 11)
    assert (used.password, watch.current.password) == ("first", "second")
    assert not watch.changed(1e9 + 22)
    authority.issue("station")
    assert watch.changed(1e9 + 33)


def test_credentials_that_do_not_load_leave_the_old_ones_and_an_alarm_until_they_do(settings, authority):
    watch = CredentialWatch(settings)
    used, right = watch.current, settings.key_file.read_bytes()
    settings.key_file.write_bytes(b"half a ke")
    assert not watch.changed(1e9)
    assert watch.current is used
    assert [alarm.code for alarm in watch.alarms] == ["credentials_unusable"]
    settings.key_file.unlink()
    assert not watch.changed(1e9 + 11)
    assert "is not a file" in watch.alarms[0].detail
    settings.key_file.write_bytes(right)
    assert watch.changed(1e9 + 22)
    assert watch.alarms == []


def test_a_key_of_another_certificate_is_refused_at_the_start(settings, authority, tmp_path):
    _, other = authority.issue("other")
    settings.key_file.write_bytes(other.read_bytes())
    with pytest.raises(SettingsError, match=r"^mqtt\.ca_file, cert_file, key_file"):
        CredentialWatch(settings)
