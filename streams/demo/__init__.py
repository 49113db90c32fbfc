"""`millstream demo`: simulated users on a real Kafka, half of them with our slates, half with a popularity list."""
