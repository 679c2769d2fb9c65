"""Ray clusters: a session in this process, jobs sent to a running cluster, and the checks before either."""
