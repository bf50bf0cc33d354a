"""The data plane. One request, in order: protocol -> paths -> keys -> body -> admission (routing) -> pool -> relay."""
