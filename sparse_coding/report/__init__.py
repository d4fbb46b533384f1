"""Reports drawn from the data files of a run folder: pictures and one HTML page that opens with no network."""

from sparse_coding.report.choose import best_by_site, best_member, best_members
from sparse_coding.report.run_report import write_run_report
from sparse_coding.report.toy_report import write_toy_report
from sparse_coding.report.trade_off import architecture_frontier

__all__ = [
    "architecture_frontier",
    "best_by_site",
    "best_member",
    "best_members",
    "write_run_report",
    "write_toy_report",
]
