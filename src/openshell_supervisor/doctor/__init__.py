"""The doctor: what this host, container and user can enforce, found by trying, and how to mend what they refuse."""
