"""What evaluates the rules: Rego in the process, and later an OPA server. Engines know JSON and rule names, nothing more."""
