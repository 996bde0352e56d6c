"""What every primitive stands on: loading the compiled parts, registering ops, reporting what runs."""
