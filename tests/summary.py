"""Closing lines of `make test`: how many tests ran in each tier, and every skipped one with its reason."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

REPORTS = Path(__file__).parents[1] / ".moerator" / "reports"


def main() -> int:
    """Print the sums of the tiers' reports; 1 when a tier failed or none ran."""
    passed = failed = skipped = 0
    for report in sorted(REPORTS.glob("*.xml")):
        suite = ET.parse(report).getroot().find("testsuite")
        if suite is None:
            continue
        tests, skips = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        faults = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        print(f"{report.stem:12} {tests - skips - faults:5} passed {float(suite.get('time', 0)):8.1f} s")
        for case in suite.iter("testcase"):
            for skip in case.iter("skipped"):
                print(f"{'':12} skipped {case.get('classname')}::{case.get('name')}: {skip.get('message')}")
        passed, failed, skipped = passed + tests - skips - faults, failed + faults, skipped + skips
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
