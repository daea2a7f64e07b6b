"""The phone and line of tau2-bench's telecom domain: their normal readings, and what each fault changes.

Labels and normal values are those of the benchmark's tools and databases, for the line that all of its tasks are about.
A SIM card that is locked and missing has both readings, as in the benchmark's database; its phone would show the lock
only after the card has been reseated, and tasks that need different actions would look the same.
"""

from __future__ import annotations

from collections.abc import Sequence

NORMAL = {
    "Airplane mode": "OFF",
    "SIM card missing": "No",
    "SIM card status": "active",
    "Network mode preference": "4g_5g_preferred",
    "Mobile data": "ON",
    "Data roaming on the device": "OFF",
    "Data saver mode": "OFF",
    "APN name": "internet",
    "MMSC URL": "http://mms.carrier.com/mms/wapenc",
    "Wi-Fi calling": "OFF",
    "VPN": "OFF",
    "Permissions of the messaging app": "sms, storage, phone",
    "Line status": "Active",
    "Contract end date": "2026-12-31",
    "Overdue bill": "none",
    "Roaming on the line": "ON",
    "Data used": "8.7 of 15 GB",
}
"""Reading by label, in the order in which they are listed."""
PERMISSIONS = "Permissions of the messaging app"
CHANGES = {
    "turn_airplane_mode_on": {"Airplane mode": "ON"},
    "unseat_sim_card": {"SIM card missing": "Yes"},
    "lock_sim_card": {"SIM card status": "locked_{mode}"},
    "set_network_mode_preference": {"Network mode preference": "{mode}"},
    "turn_data_off": {"Mobile data": "OFF"},
    "turn_roaming_on": {"Data roaming on the device": "ON"},
    "turn_roaming_off": {"Data roaming on the device": "OFF"},
    "turn_data_saver_mode_on": {"Data saver mode": "ON"},
    "break_apn_settings": {"APN name": "broken"},
    "break_apn_mms_setting": {"MMSC URL": "Not Set"},
    "break_vpn": {"VPN": "ON and connected, server performance: poor"},
    "enable_roaming": {"Roaming on the line": "ON"},
    "disable_roaming": {"Roaming on the line": "OFF"},
    "set_data_usage": {"Data used": "{data_used_gb} of 15 GB"},
}
"""Readings after an action that causes a fault; `{mode}` is an argument of the action."""
UNSEEN = ("set_user_info", "set_user_location", "simulate_network_search")
"""Actions that change no reading; the ticket has the name and the location."""


def readings(actions: Sequence[dict]) -> str:
    """Readings of a phone and its line after some actions, one per line.

    Args:
        actions: Actions of a task's initial state, each with `func_name` and `arguments`.

    Raises:
        ValueError: If an action isn't known.

    Example:
        >>> print(readings([{"func_name": "lock_sim_card", "arguments": {"mode": "pin"}}]))
        Airplane mode: OFF
        SIM card missing: No
        SIM card status: locked_pin
        ...
    """
    state = dict(NORMAL)
    for action in actions:
        name, arguments = action["func_name"], action["arguments"]
        if name in CHANGES:
            state |= {label: value.format(**arguments) for label, value in CHANGES[name].items()}
        elif name == "remove_app_permission" and arguments["app_name"] == "messaging":
            kept = [
                permission for permission in state[PERMISSIONS].split(", ") if permission != arguments["permission"]
            ]
            state[PERMISSIONS] = ", ".join(kept)
        elif name == "set_wifi_calling":
            state["Wi-Fi calling"] = "ON" if arguments["enabled"] else "OFF"
        elif name == "suspend_line_for_overdue_bill":
            state |= {"Line status": "Suspended", "Overdue bill": arguments["new_bill_id"]}
            state |= {"Contract end date": "2025-01-31"} if arguments["contract_ended"] else {}
        elif name not in UNSEEN:
            raise ValueError(f"The task's initial state has the action {name!r}, whose effect isn't known.")
    return "\n".join(f"{label}: {value}" for label, value in state.items())
