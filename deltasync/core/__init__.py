"""What both wings agree on: values and decisions; touches no machine."""
