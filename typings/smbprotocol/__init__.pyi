# smbprotocol brings no types; these are of what we use, checked against 1.17.
class Dialects:
    SMB_2_0_2: int
    SMB_2_1_0: int
    SMB_3_0_0: int
    SMB_3_0_2: int
    SMB_3_1_1: int
