"""Numbers as people read them, the same way as the command `vmgang` writes them."""

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(number):
    """1536 becomes "1.50 KiB"."""
    number = float(number)
    for unit in UNITS:
        if number < 1024 or unit == UNITS[-1]:
            return "%d B" % number if unit == "B" else "%.2f %s" % (number, unit)
        number /= 1024
    return ""


def duration(milliseconds):
    """1234 becomes "1.2 s", 300 "300 ms"."""
    if milliseconds < 1000:
        return "%d ms" % milliseconds
    if milliseconds < 120000:
        return "%.1f s" % (milliseconds / 1000)
    return "%d min %02d s" % (milliseconds // 60000, milliseconds // 1000 % 60)


def vms(number):
    """1 becomes "1 VM", 3 "3 VMs"."""
    return "1 VM" if number == 1 else "%d VMs" % number
