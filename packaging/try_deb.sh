#!/bin/sh
# Proves a package in a fresh Debian of its own, booted without a network: it installs, a station starts from it and
# goes on when the package of another engine takes over, settings outlive its removal, and a purge leaves nothing. As
# root, with debootstrap and systemd-container:
#   sh packaging/try_deb.sh dist/taktsight-openvino_0.1.0_amd64.deb [bookworm [FOLDER of the fresh system, made once]]
set -eu
package=$(readlink -f "$1")
suite=${2:-bookworm}
fresh=${3:-$PWD/build/$suite}
machine=$fresh.booted

if [ ! -d "$fresh" ]; then
    debootstrap --variant=minbase --include=python3,systemd,systemd-sysv,dbus "$suite" "$fresh.new" >"$fresh.log"
    mv "$fresh.new" "$fresh"
fi
rm -rf "$machine"
cp -a "$fresh" "$machine"
trap 'rm -rf "$machine"' EXIT
cp "$package" "$machine/package.deb"
cat >"$machine/etc/systemd/system/scenario.service" <<'UNIT'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh /scenario
ExecStopPost=systemctl --no-block poweroff
StandardOutput=file:/printed
StandardError=file:/printed
UNIT
cat >"$machine/scenario" <<'SCENARIO'
set -eux
package=$(dpkg-deb --field /package.deb Package)
others='^/var/(lib/(dpkg|systemd)|cache/(apt|debconf|ldconfig))/|^/etc/[a-z]*-$|[.]pwd[.]lock'
listed() { find /etc /opt /usr /var/lib /var/cache -xdev | grep -vE "$others" | sort; }
listed >/before
dpkg -i /package.deb
dpkg -i /package.deb # and again: an upgrade
taktsight-agent doctor
taktsight-agent install cell7 --camera gige
taktsight-agent install cell7
systemctl is-enabled taktsight-agent@cell7
mkdir -p /var/lib/taktsight/cell7/parts
if systemctl start taktsight-agent@cell7; then exit 1; fi # an example: it has no recipe
systemctl show taktsight-agent@cell7 --property=ExecMainStatus | grep -xE 'ExecMainStatus=[457]' # and it says which
journalctl -u taktsight-agent@cell7 --no-pager | tail -3
goes_on() {
    systemctl is-enabled taktsight-agent@cell7
    test -e /etc/systemd/system/taktsight-agent@cell7.service.d/gige.conf
    test -e /etc/taktsight/cell7.yaml
    test -e /var/lib/taktsight/cell7/parts
    taktsight-agent --version
}
# The same wheels, as if for another engine: it takes the package's place, and a purge of what that left takes nothing
other=taktsight-onnxruntime
if [ "$package" = "$other" ]; then other=taktsight-openvino; fi
dpkg-deb --raw-extract /package.deb /other
sed -i "s/$other/PACKAGE/; s/$package/$other/; s/PACKAGE/$package/" /other/DEBIAN/control
(
    cd /other/usr/share/taktsight
    echo '# another engine' >>requirements.txt
    digest=$(sha256sum requirements.txt)
    sed -i "s|^.*  requirements.txt$|$digest|" SHA256SUMS
)
dpkg-deb --build /other /other.deb >/dev/null
before=$(readlink /opt/taktsight)
dpkg -i /other.deb
test "$(readlink /opt/taktsight)" != "$before"
goes_on
dpkg --purge "$package"
goes_on
dpkg -i /package.deb # and back again
goes_on
dpkg --purge "$other"
rm -r /other /other.deb
dpkg --remove "$package"
test -e /etc/taktsight/cell7.yaml
test ! -e /opt/taktsight
test ! -e /etc/systemd/system/taktsight-agent@cell7.service.d
dpkg --purge "$package"
if getent passwd taktsight; then exit 1; fi
listed >/after
diff /before /after
touch /passed
SCENARIO
systemd-nspawn --quiet --directory="$machine" --register=no --keep-unit --private-network --boot \
    systemd.unit=scenario.service systemd.show_status=0 >"$fresh.boot.log" 2>&1 </dev/null || true
cat "$machine/printed"
test -e "$machine/passed"
echo "passed: $suite"
