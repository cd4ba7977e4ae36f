"""The report of a dataset and a trained model: every link of the chain in pictures, and a number for each.

    made = make_report("data/demo", "runs/demo")
    made.path          # data/demo/reports/index.html, one self-contained file

The page, the numbers as JSON and a strip of pictures for a README lie in DATASET/reports.
"""

from fourmill.flows.report.make import ReportResult, make_report
from fourmill.flows.report.tables import numbers_table

__all__ = ["ReportResult", "make_report", "numbers_table"]
