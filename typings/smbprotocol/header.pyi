class Commands:
    SMB2_SESSION_SETUP: int
