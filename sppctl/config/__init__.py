"""Configuration: the schema, YAML files and overrides."""
