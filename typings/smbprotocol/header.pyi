from smbprotocol.structure import Structure

class Commands:
    SMB2_CREATE: int
    SMB2_CLOSE: int
    SMB2_FLUSH: int
    SMB2_READ: int
    SMB2_WRITE: int
    SMB2_QUERY_DIRECTORY: int
    SMB2_QUERY_INFO: int
    SMB2_SET_INFO: int
    SMB2_SESSION_SETUP: int

class Smb2Flags:
    SMB2_FLAGS_SIGNED: int

class SMB2HeaderResponse(Structure): ...
