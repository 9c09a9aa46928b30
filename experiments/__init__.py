"""Many runs, compared: plans, suites, finished runs, tables, the report."""
