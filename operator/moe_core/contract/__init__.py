"""What operator and pods exchange: values only, no behaviour that needs a clock or a wire."""
