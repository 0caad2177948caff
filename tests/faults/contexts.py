"""A plugin of pytest that tells coverage which test runs, in processes that tests start too."""

import os

import coverage


def pytest_runtest_protocol(item):
  """Called before each test."""
  os.environ['COVERAGE_TEST'] = item.nodeid  # Read by coverage.ini in processes that the test starts.
  if (measured := coverage.Coverage.current()) is not None:
    measured.switch_context(item.nodeid)
