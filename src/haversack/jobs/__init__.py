"""Jobs execute plans: pack, run, verify."""
