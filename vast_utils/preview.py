"""What a launch or a sweep would do, shown before anything is rented: the machine, the worst case, what is sent."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sparse_coding.errors import UserError
from vast_utils.account import Account
from vast_utils.offers import nothing_fits, ranked
from vast_utils.push import folder_files, project_files
from vast_utils.secrets import collect
from vast_utils.session import RentFlags
from vast_utils.tasks import Task

SHOWN = 12


def preview(account: Account, flags: RentFlags, run_name: str, tasks: Sequence[Task], machines: int) -> None:
    """Say what would be rented, what it can cost at worst, what would run and what would be sent. Rents nothing."""
    need, caps, folder = flags.need(machines), flags.caps(machines), flags.folder
    fitting = ranked(account, need)
    if not fitting:
        raise UserError(nothing_fits(account, need))
    offer, price = fitting[0]
    kind = "interruptible" if need.interruptible else "on demand"
    here = price.dearest(caps.max_price) * caps.max_hours + price.traffic
    print(f"run       {run_name}")
    print(
        f"machine   {offer.num_gpus}x {offer.gpu_name}, {offer.geolocation or 'somewhere'}, ${price.hourly:.3f}/h "
        f"{kind}: offer {offer.id}, the cheapest of {len(fitting)} that fit"
    )
    several = f" on each of {machines} machines" if machines > 1 else ""
    print(
        f"at most   ${caps.max_cost:.2f} in all, also where others replace it, up to ${caps.max_price:.3f}/h; "
        f"${min(here, caps.max_cost):.2f} for {caps.max_hours:g} h on this one{several}"
    )
    print(
        f"traffic   ${price.traffic:.2f} for {need.down:g} GB down and {need.up:g} GB up are reckoned in; each GB more "
        f"costs ${offer.inet_down_cost:.3f} down, ${offer.inet_up_cost:.3f} up"
    )
    for task in tasks[:SHOWN]:
        print(f"command   {' '.join(task.argv)}")
    if len(tasks) > SHOWN:
        print(f"          and {len(tasks) - SHOWN} more")
    chosen = project_files(folder)
    print(f"sends     {len(chosen.names)} files of {folder.resolve()}, {chosen.bytes / 1e6:.1f} MB")
    for models in flags.models:
        print(f"          {models}, {folder_files(models).bytes / 1e6:.1f} MB")
    for name, why in chosen.left_out.items():
        print(f"left out  {name}: {why}")
    print(f"variables {', '.join(collect(os.environ, flags.env)) or 'none'}")
    credit = account.credit()
    if credit is not None and credit < min(machines * here, caps.max_cost):
        print(f"note      the account holds ${credit:.2f}: vast.ai stops machines when it is used up")
