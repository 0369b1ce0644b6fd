"""One file per family of problems; `registry.get(name)` finds them. Generators and verifiers are reasoning-gym's own."""
