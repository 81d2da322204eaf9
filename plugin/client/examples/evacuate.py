#!/usr/bin/python3
"""Empties this host: each gang as one job, then whatever else runs. evacuate.py DESTURI"""

import json
import sys
import time

import dbus

SERVICE = "org.vmgang.VMGang1"


def migrate(bus, manager, gang, destination, options):
    """Migrates one gang and waits until it is there."""
    # Checking everything beforehand may take longer than a call usually may.
    path = manager.Migrate(gang, destination, dbus.Dictionary(options, signature="sv"), timeout=120)
    job = dbus.Interface(bus.get_object(SERVICE, path), dbus.PROPERTIES_IFACE)
    while not (result := job.Get("org.vmgang.Job1", "Result")):
        time.sleep(0.5)
    result = json.loads(result)
    if result["state"] != "completed":
        sys.exit(f"{gang}: {result['state']}: {result['error']}")
    sent, stream = result["bytes"]["wire"] >> 20, result["bytes"]["qemu_stream"] >> 20
    domains = len(result["domains"])
    print(f"{gang or 'the rest'}: {domains} domains, {sent} MiB over the network instead of {stream} MiB")


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: evacuate.py DESTURI")
    destination = sys.argv[1]
    bus = dbus.SystemBus()
    manager = dbus.Interface(bus.get_object(SERVICE, "/org/vmgang/VMGang1"), "org.vmgang.Manager1")
    gangs, _ = manager.ListGangs()
    for gang, running, _ in gangs:
        if running:
            migrate(bus, manager, gang, destination, {})
    try:
        migrate(bus, manager, "", destination, {"all": True})
    except dbus.DBusException as error:
        if error.get_dbus_name() != "org.vmgang.Error.NoRunningMember":
            sys.exit(error.get_dbus_message())


if __name__ == "__main__":
    main()
