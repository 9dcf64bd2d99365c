"""What a check found, for machines: JSON, JUnit XML, and the step summary of GitHub Actions."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path

from harness.errors import InputError
from harness.gates.check import Report
from harness.gates.result import GateResult
from harness.gates.tolerance import Undecided

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"

# Control characters that XML 1.0 cannot hold, not even escaped.
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def as_json(report: Report, undecided: Undecided) -> str:
    """The whole report, passed gates too; what is not known is null."""
    counts = {outcome: len(report.of(outcome)) for outcome in ("violated", "undecided", "passed")}
    head = {"exit_code": report.exit_code(undecided), "undecided": undecided, "counts": counts}
    runs = {"baseline": report.baseline, "baseline_run": report.baseline_run, "run": report.run}
    body = {"findings": [asdict(result) for result in report.results], "notes": report.notes}
    return json.dumps(head | runs | body, indent=2, ensure_ascii=False) + "\n"


def as_junit(report: Report, undecided: Undecided) -> str:
    """One test case a gate: a violation is a failure; an undecided gate is skipped, or a failure if it is to fail.

    A skipped case was looked at and could not be decided; that does not mean that it passed.
    """
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", name=_xml(f"harness check {report.baseline}"))
    for result in report.results:
        _case(suite, result, undecided)
    counts = {"tests": len(suite), "failures": len(suite.findall("testcase/failure"))}
    for name, number in (counts | {"skipped": len(suite.findall("testcase/skipped")), "errors": 0}).items():
        suite.set(name, str(number))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def as_markdown(report: Report, undecided: Undecided) -> str:
    """The lines of the report as a section of Markdown: summary, then a table of what did not pass, then notes."""
    parts = [f"### harness check {report.baseline}", "", report.summary(undecided), ""]
    if found := [*report.of("violated"), *report.of("undecided")]:
        parts += ["| | cell | found |", "|---|---|---|", *map(_row, found), ""]
    return "\n".join([*parts, *(f"- {note}" for note in report.notes), ""]) + "\n"


def write_outputs(report: Report, undecided: Undecided, json_file: Path | None, junit: Path | None) -> None:
    """Writes the files that are asked for, and appends to the step summary where GitHub Actions has one.

    Raises:
        InputError: a file cannot be written.
    """
    if json_file is not None:
        _write(json_file, as_json(report, undecided), "w")
    if junit is not None:
        _write(junit, as_junit(report, undecided), "w")
    if summary := os.environ.get(SUMMARY_VARIABLE):
        _write(Path(summary), as_markdown(report, undecided), "a")


def _case(suite: ElementTree.Element, result: GateResult, undecided: Undecided) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=_xml(result.cell), name=result.gate)
    if result.outcome == "passed":
        return
    failed = result.outcome == "violated" or undecided == "fail"
    ElementTree.SubElement(case, "failure" if failed else "skipped", message=_xml(result.text))


def _row(result: GateResult) -> str:
    mark = "❌" if result.outcome == "violated" else "❔"
    return f"| {mark} | {_cell(result.cell)} | {_cell(result.text)} |"


def _xml(text: str) -> str:
    return _NO_XML.sub("?", text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _write(path: Path, text: str, mode: str) -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
