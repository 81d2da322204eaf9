#!/bin/sh
# A screen that nobody sees, with a window manager and virt-manager on it: session.sh DIRECTORY. Runs in a session bus
# of its own, and leaves in DIRECTORY/environment how others reach both.
set -eu
directory=$1
mkdir -p "$HOME/.config/glib-2.0/settings"
cat > "$HOME/.config/glib-2.0/settings/keyfile" <<END
[org/virt-manager/virt-manager/connections]
uris=['qemu:///system', 'qemu+tls://b/system']
autoconnect=['qemu:///system']
END
Xvfb -displayfd 3 -screen 0 1280x1024x24 -nolisten tcp 3> "$directory/display" 2> "$directory/xvfb.log" &
while ! grep -q . "$directory/display"; do sleep 0.1; done
export DISPLAY=:$(cat "$directory/display") XDG_RUNTIME_DIR="$directory" GSETTINGS_BACKEND=keyfile
xfwm4 2> "$directory/xfwm4.log" &
echo "export HOME=$HOME DISPLAY=$DISPLAY XDG_RUNTIME_DIR=$directory DBUS_SESSION_BUS_ADDRESS='$DBUS_SESSION_BUS_ADDRESS'" \
    > "$directory/environment.new"
mv "$directory/environment.new" "$directory/environment"
exec virt-manager --debug > "$directory/virt-manager.log" 2>&1
