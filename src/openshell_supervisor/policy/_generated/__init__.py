"""Protobuf messages, generated from proto/ by `make proto`. Not to be edited."""
