"""The flow room: Prefect flows, Ray actors, command line and reports."""
