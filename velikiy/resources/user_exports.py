"""The columns of users in the exports of other programs, as `column_key` spells them."""

from velikiy.resources.base import KnownExport

COLUMN_SYNONYMS = {
    "name": (
        ("name",),
        ("fullname",),
        ("displayname",),
        ("namedisplaynamerequired",),
        ("nameformatted",),
        ("profiledisplayname",),
        ("firstname", "middlename", "lastname"),
        ("givenname", "middlename", "familyname", "surname"),
        ("firstnamerequired", "lastnamerequired"),
        ("namegivenname", "namefamilyname"),
        ("profilefirstname", "profilelastname"),
        ("имя", "отчество", "фамилия"),
        ("фио",),
        ("полноеимя",),
    ),
    "email": (
        ("email",),
        ("mail",),
        ("emailaddress",),
        ("emailaddressrequired",),
        ("useremail",),
        ("primaryemail",),
        ("primaryemailaddress",),
        ("profileemail",),
        ("email1value",),
        ("email2value",),
        ("userprincipalname",),
        ("usernameuserprincipalnamerequired",),
        ("электроннаяпочта",),
        ("адресэлектроннойпочты",),
        ("почта",),
    ),
}


def _known(program: str, *columns: str) -> KnownExport:
    return KnownExport(program, frozenset(columns))


KNOWN_EXPORTS = (
    KnownExport("Google Contacts", frozenset({"email1value"}), value_separator=" ::: "),
    _known("Google Workspace", "firstnamerequired", "emailaddressrequired"),
    _known("Outlook", "emailaddress", "email2address"),
    _known("Outlook", "emailaddress", "emailtype"),
    _known("Outlook", "emailaddress", "emaildisplayname"),
    _known("Thunderbird", "primaryemail", "displayname"),
    _known("Mailchimp", "emailaddress", "memberrating"),
    _known("Mailchimp", "emailaddress", "optintime"),
    _known("WordPress", "userlogin", "useremail"),
    _known("Active Directory", "samaccountname"),
    _known("Microsoft 365", "namedisplaynamerequired", "usernameuserprincipalnamerequired"),
    KnownExport(
        "Microsoft 365",
        frozenset({"username", "displayname", "alternateemailaddress"}),
        synonyms={"email": (("username",),)},
    ),
    _known("Microsoft 365", "userprincipalname", "displayname"),
    _known("Okta", "profilelogin", "profileemail"),
    _known("Okta", "login", "firstname", "lastname", "email"),
    _known("Keycloak", "username", "emailverified"),
    _known("Keycloak", "username", "firstname", "lastname", "requiredactions"),
    _known("Moodle", "username", "firstname", "lastname", "email"),
    _known("Firebase", "localid", "email"),
    _known("Amazon Cognito", "cognitousername"),
    _known("Auth0", "userid", "email", "name"),
    _known("Auth0", "email", "emailverified"),
)
"""The first export whose columns are all present is the one."""
