"""From measured times to a device's constants."""
