"""The durable outbox: what was decided stays here until every consumer has it."""
