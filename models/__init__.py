"""Decides: events in, state and scores out. No Kafka, no Faust, no HTTP, no environment, no wall clock."""
