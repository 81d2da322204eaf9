# What `make install` puts where. Honours DESTDIR, PREFIX and the usual directory names.
PREFIX ?= /usr
BUILD_DIR ?= $(or $(CARGO_TARGET_DIR),target)/release
bindir ?= $(PREFIX)/bin
sbindir ?= $(PREFIX)/sbin
datadir ?= $(PREFIX)/share
# systemd, tmpfiles, D-Bus and polkit look below /usr: another PREFIX is for packagers only.
unitdir ?= $(PREFIX)/lib/systemd/system
tmpfilesdir ?= $(PREFIX)/lib/tmpfiles.d
sysconfdir ?= /etc

.PHONY: install-files uninstall
# Expects the programs in BUILD_DIR.
install-files:
	install -D -m 0755 $(BUILD_DIR)/vmgang $(DESTDIR)$(bindir)/vmgang
	install -D -m 0755 $(BUILD_DIR)/vmgangd $(DESTDIR)$(sbindir)/vmgangd
	install -d $(DESTDIR)$(unitdir)
	sed 's|@sbindir@|$(sbindir)|' packaging/vmgangd.service > $(DESTDIR)$(unitdir)/vmgangd.service
	chmod 0644 $(DESTDIR)$(unitdir)/vmgangd.service
	install -D -m 0644 packaging/vmgang.tmpfiles $(DESTDIR)$(tmpfilesdir)/vmgang.conf
	install -D -m 0644 packaging/org.vmgang.VMGang1.conf $(DESTDIR)$(datadir)/dbus-1/system.d/org.vmgang.VMGang1.conf
	install -D -m 0644 packaging/org.vmgang.VMGang1.service $(DESTDIR)$(datadir)/dbus-1/system-services/org.vmgang.VMGang1.service
	install -D -m 0644 xml-schemas/org.vmgang.Manager1.xml $(DESTDIR)$(datadir)/dbus-1/interfaces/org.vmgang.Manager1.xml
	install -D -m 0644 xml-schemas/org.vmgang.Job1.xml $(DESTDIR)$(datadir)/dbus-1/interfaces/org.vmgang.Job1.xml
	install -D -m 0644 packaging/org.vmgang.policy $(DESTDIR)$(datadir)/polkit-1/actions/org.vmgang.policy
	install -D -m 0644 xml-schemas/member.rng $(DESTDIR)$(datadir)/vmgang/schemas/member.rng
	install -D -m 0644 packaging/apparmor-libvirt-qemu $(DESTDIR)$(sysconfdir)/apparmor.d/abstractions/libvirt-qemu.d/vmgang
	# The administrator's own configuration stays.
	test -e $(DESTDIR)$(sysconfdir)/vmgang/vmgang.toml || install -D -m 0644 packaging/vmgang.toml $(DESTDIR)$(sysconfdir)/vmgang/vmgang.toml

uninstall: ## what install has put there; configuration and history stay
	rm -f $(DESTDIR)$(bindir)/vmgang $(DESTDIR)$(sbindir)/vmgangd
	rm -f $(DESTDIR)$(unitdir)/vmgangd.service $(DESTDIR)$(tmpfilesdir)/vmgang.conf
	rm -f $(DESTDIR)$(datadir)/dbus-1/system.d/org.vmgang.VMGang1.conf
	rm -f $(DESTDIR)$(datadir)/dbus-1/system-services/org.vmgang.VMGang1.service
	rm -f $(DESTDIR)$(datadir)/dbus-1/interfaces/org.vmgang.Manager1.xml $(DESTDIR)$(datadir)/dbus-1/interfaces/org.vmgang.Job1.xml
	rm -f $(DESTDIR)$(datadir)/polkit-1/actions/org.vmgang.policy
	rm -rf $(DESTDIR)$(datadir)/vmgang/schemas
	rm -f $(DESTDIR)$(sysconfdir)/apparmor.d/abstractions/libvirt-qemu.d/vmgang
