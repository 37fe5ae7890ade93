BEGIN TRANSACTION;
CREATE TABLE origin (ledger TEXT NOT NULL);
INSERT INTO "origin" VALUES('160431eacc334fd5b23a705591f7cf21');
CREATE TABLE releases (
    id INTEGER PRIMARY KEY,
    client TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    noise_multiplier REAL NOT NULL,
    sample_rate REAL NOT NULL,
    steps INTEGER NOT NULL,
    written_at TEXT NOT NULL
, planned INTEGER NOT NULL DEFAULT 0, rdp_order REAL, digest TEXT NOT NULL DEFAULT '', trust TEXT NOT NULL DEFAULT 'local', inputs TEXT NOT NULL DEFAULT '', outputs TEXT NOT NULL DEFAULT '');
INSERT INTO "releases" VALUES(1,'ward','run',1,2.0,0.1,1,'2026-11-29T21:04:51+00:00',50,NULL,'040a2f31939dc0d672d8bca39d879738fd3c5a174027db9b4df6da139bf96430','local','','');
INSERT INTO "releases" VALUES(2,'ward','run',2,2.0,0.1,1,'2026-11-29T21:04:52+00:00',50,NULL,'0e50d7786f6279f48f8a023dd5be89e078b85588fe4a1967cd2c73d3428ef037','local','','');
INSERT INTO "releases" VALUES(3,'desk','run',1,2.0,0.1,1,'2026-11-29T21:05:11+00:00',10,4.0,'6d1b9afb845fa23c993d64c02f6b31b540c67d11423b4a595d74957c81e5575d','local','','');
INSERT INTO "releases" VALUES(4,'desk','run',2,2.0,0.1,1,'2026-11-29T21:05:11+00:00',10,4.0,'286ea5bf286ccda5dd922f0ca3f851243b37034afa677d40d5cf6ed45d8b088c','local','','');
CREATE INDEX releases_of_client ON releases (client, run);
COMMIT;
PRAGMA user_version = 3;
