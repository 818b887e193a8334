"""What a run was worth: reports and plots from run folders."""
