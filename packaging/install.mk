# What `make install` puts where. Honours DESTDIR, PREFIX and the usual directory names.
PREFIX ?= /usr
BUILD_DIR ?= $(or $(CARGO_TARGET_DIR),target)/release
bindir ?= $(PREFIX)/bin
sbindir ?= $(PREFIX)/sbin
libexecdir ?= $(PREFIX)/libexec
datadir ?= $(PREFIX)/share
mandir ?= $(datadir)/man
# Where the Python that runs virt-manager looks.
pythondir ?= $(PREFIX)/lib/python3/dist-packages
# systemd, tmpfiles, D-Bus and polkit look below /usr: another PREFIX is for packagers only.
unitdir ?= $(PREFIX)/lib/systemd/system
sysusersdir ?= $(PREFIX)/lib/sysusers.d
tmpfilesdir ?= $(PREFIX)/lib/tmpfiles.d
sysconfdir ?= /etc
# Manual pages and completions, made by a program of the build.
manuals = $(BUILD_DIR)/manuals

.PHONY: install-files uninstall
# Expects the programs in BUILD_DIR, and in its `examples` the one that makes the manuals.
install-files:
	install -D -m 0755 $(BUILD_DIR)/vmgang $(DESTDIR)$(bindir)/vmgang
	install -D -m 0755 $(BUILD_DIR)/vmgangd $(DESTDIR)$(sbindir)/vmgangd
	install -D -m 0755 $(BUILD_DIR)/vmgang-hook $(DESTDIR)$(sbindir)/vmgang-hook
	install -D -m 0755 $(BUILD_DIR)/vmgang-virsh $(DESTDIR)$(libexecdir)/vmgang/virsh
	install -d $(DESTDIR)$(sysconfdir)/libvirt/hooks/qemu.d
	sed 's|@sbindir@|$(sbindir)|' hooks/qemu > $(DESTDIR)$(sysconfdir)/libvirt/hooks/qemu.d/vmgang
	chmod 0755 $(DESTDIR)$(sysconfdir)/libvirt/hooks/qemu.d/vmgang
	install -d $(DESTDIR)$(unitdir)
	sed 's|@sbindir@|$(sbindir)|' packaging/vmgangd.service > $(DESTDIR)$(unitdir)/vmgangd.service
	chmod 0644 $(DESTDIR)$(unitdir)/vmgangd.service
	install -D -m 0644 packaging/vmgang.sysusers $(DESTDIR)$(sysusersdir)/vmgang.conf
	install -D -m 0644 packaging/vmgang.tmpfiles $(DESTDIR)$(tmpfilesdir)/vmgang.conf
	install -D -m 0644 packaging/org.vmgang.VMGang1.conf $(DESTDIR)$(datadir)/dbus-1/system.d/org.vmgang.VMGang1.conf
	install -D -m 0644 packaging/org.vmgang.VMGang1.service $(DESTDIR)$(datadir)/dbus-1/system-services/org.vmgang.VMGang1.service
	install -D -m 0644 xml-schemas/org.vmgang.Manager1.xml $(DESTDIR)$(datadir)/dbus-1/interfaces/org.vmgang.Manager1.xml
	install -D -m 0644 xml-schemas/org.vmgang.Job1.xml $(DESTDIR)$(datadir)/dbus-1/interfaces/org.vmgang.Job1.xml
	install -D -m 0644 packaging/org.vmgang.policy $(DESTDIR)$(datadir)/polkit-1/actions/org.vmgang.policy
	install -D -m 0644 packaging/org.vmgang.rules $(DESTDIR)$(datadir)/polkit-1/rules.d/50-vmgang.rules
	install -D -m 0644 xml-schemas/member.rng $(DESTDIR)$(datadir)/vmgang/schemas/member.rng
	install -D -m 0644 packaging/selinux/vmgang.te $(DESTDIR)$(datadir)/vmgang/selinux/vmgang.te
	install -D -m 0644 packaging/selinux/vmgang.fc $(DESTDIR)$(datadir)/vmgang/selinux/vmgang.fc
	install -D -m 0644 packaging/apparmor-libvirt-qemu $(DESTDIR)$(sysconfdir)/apparmor.d/abstractions/libvirt-qemu.d/vmgang
	install -d $(DESTDIR)$(pythondir)/vmgang_virt_manager
	install -m 0644 plugin/virt-manager/vmgang_virt_manager/*.py plugin/virt-manager/vmgang_virt_manager/*.ui $(DESTDIR)$(pythondir)/vmgang_virt_manager
	install -m 0644 plugin/virt-manager/vmgang_virt_manager.pth $(DESTDIR)$(pythondir)/vmgang_virt_manager.pth
	rm -rf $(manuals)
	$(BUILD_DIR)/examples/manuals packaging/vmgang.toml $(manuals)
	install -d $(DESTDIR)$(mandir)/man1 $(DESTDIR)$(mandir)/man5 $(DESTDIR)$(mandir)/man8
	install -m 0644 $(manuals)/*.1 $(DESTDIR)$(mandir)/man1
	install -m 0644 $(manuals)/*.5 $(DESTDIR)$(mandir)/man5
	install -m 0644 packaging/man/*.8 $(DESTDIR)$(mandir)/man8
	install -D -m 0644 $(manuals)/vmgang.bash $(DESTDIR)$(datadir)/bash-completion/completions/vmgang
	install -D -m 0644 $(manuals)/_vmgang $(DESTDIR)$(datadir)/zsh/site-functions/_vmgang
	install -D -m 0644 $(manuals)/vmgang.fish $(DESTDIR)$(datadir)/fish/vendor_completions.d/vmgang.fish
	# The administrator's own configuration stays.
	test -e $(DESTDIR)$(sysconfdir)/vmgang/vmgang.toml || install -D -m 0644 packaging/vmgang.toml $(DESTDIR)$(sysconfdir)/vmgang/vmgang.toml
	test -e $(DESTDIR)$(sysconfdir)/vmgang/incoming.toml || install -D -m 0644 packaging/incoming.toml $(DESTDIR)$(sysconfdir)/vmgang/incoming.toml

uninstall: ## what install has put there; configuration and history stay
	rm -f $(DESTDIR)$(sysconfdir)/libvirt/hooks/qemu.d/vmgang $(DESTDIR)$(sbindir)/vmgang-hook
	rm -f $(DESTDIR)$(bindir)/vmgang $(DESTDIR)$(sbindir)/vmgangd
	# Only the link that leads to vmgang, see docs/operations.md.
	test "$$(readlink $(DESTDIR)/usr/local/bin/virsh)" != $(libexecdir)/vmgang/virsh || rm $(DESTDIR)/usr/local/bin/virsh
	rm -rf $(DESTDIR)$(libexecdir)/vmgang
	rm -f $(DESTDIR)$(unitdir)/vmgangd.service $(DESTDIR)$(tmpfilesdir)/vmgang.conf $(DESTDIR)$(sysusersdir)/vmgang.conf
	rm -f $(DESTDIR)$(datadir)/dbus-1/system.d/org.vmgang.VMGang1.conf
	rm -f $(DESTDIR)$(datadir)/dbus-1/system-services/org.vmgang.VMGang1.service
	rm -f $(DESTDIR)$(datadir)/dbus-1/interfaces/org.vmgang.Manager1.xml $(DESTDIR)$(datadir)/dbus-1/interfaces/org.vmgang.Job1.xml
	rm -f $(DESTDIR)$(datadir)/polkit-1/actions/org.vmgang.policy $(DESTDIR)$(datadir)/polkit-1/rules.d/50-vmgang.rules
	rm -rf $(DESTDIR)$(datadir)/vmgang
	rm -rf $(DESTDIR)$(pythondir)/vmgang_virt_manager.pth $(DESTDIR)$(pythondir)/vmgang_virt_manager
	rm -f $(DESTDIR)$(mandir)/man1/vmgang.1 $(DESTDIR)$(mandir)/man1/vmgang-*.1
	rm -f $(DESTDIR)$(mandir)/man5/vmgang.toml.5 $(DESTDIR)$(mandir)/man8/vmgangd.8
	rm -f $(DESTDIR)$(datadir)/bash-completion/completions/vmgang $(DESTDIR)$(datadir)/zsh/site-functions/_vmgang
	rm -f $(DESTDIR)$(datadir)/fish/vendor_completions.d/vmgang.fish
	rm -f $(DESTDIR)$(sysconfdir)/apparmor.d/abstractions/libvirt-qemu.d/vmgang
