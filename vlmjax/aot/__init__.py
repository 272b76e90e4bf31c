"""A train step compiled ahead of time for TPUs that are not there, and what it will cost.

`plan.plan` is the way in: topology -> compile -> read the scheduled program -> report. Every second
in a report is an estimate of the compiler or of the formula stated beside it, never a measurement.
"""
