"""How what the outbox holds reaches the plant over MQTT."""
